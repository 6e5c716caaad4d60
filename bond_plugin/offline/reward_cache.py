"""The reward cache: rewards of the initial policy's samples, in a file of JSON lines.

What ``bond cache`` writes opens with a line that records how the samples were made, then has a line a prompt:

    {"bond_cache": 1, "model": {...}, "reward": {...}, "temperature": 1.0, ..., "samples": 300, "seed": 0}
    {"prompt": "...", "responses": ["...", ...], "rewards": [0.25, ...]}

With ``--cache.log_probs`` a prompt's line has ``"tokens"`` and ``"log_probs"`` as well, a list for each response, for
algorithms that train on stored responses.

Both layouts of the vBoN authors' files are read as well, and have no record: a line a prompt as above, or a line a
sample, ``{"prompt": "...", "text": "...", "reward": 0.25}``.

Rewards are compared as the host has them, rounded to float32; so a tie in training is a tie here.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import from_json
from typing_extensions import Self

from bond_plugin.files import ContentError, LineFile, open_file, parse_json
from bond_plugin.offline.prompts import label_text
from bond_plugin.schema import Open, explain
from bond_plugin.words import reason, shorten

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
MARK = "bond_cache"
_START = json.dumps({MARK: VERSION}).removesuffix("}").encode()
_BEST_OF = (2, 4, 8, 16, 32, 64, 128)

Record = dict[str, Any]

#: What is compared between a cache and a run, and what it is called in messages.
COMPARED = {
    "model": "the initial policy",
    "reward": "the reward",
    "temperature": "--rollout.temperature",
    "max_new_tokens": "--rollout.max_new_tokens",
    "max_len": "--data.max_len",
    "min_new_tokens": "the least number of new tokens",
    "template": "the prompt's template",
}


def _float32(value: float) -> float:
    """As the host has it. It must have a place in an order."""
    (found,) = array("f", [value])
    if not math.isfinite(found):
        raise ValueError(f"a reward is {value}, which has no place in an order; a reward must be finite")
    return value


Reward = Annotated[float, AfterValidator(_float32)]


class Line(Open):
    """A prompt's line in a file of responses."""

    prompt: str
    label: Any = None
    responses: Annotated[list[str], Field(min_length=1)] | None = None
    rewards: Annotated[list[Reward], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _of_the_same_responses(self) -> Self:
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "label"}
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        if len(set(map(len, lists.values()))) > 1:
            lengths = " and ".join(str(len(value)) for value in lists.values())
            raise ValueError(f"{' and '.join(map(repr, lists))} differ in length: {lengths}")
        return self


class _Cached(Line):
    tokens: list[list[int]] | None = None
    log_probs: list[list[float]] | None = None

    @model_validator(mode="after")
    def _of_the_same_tokens(self) -> Self:
        if [len(one) for one in self.tokens or []] != [len(one) for one in self.log_probs or []]:
            raise ValueError("'tokens' and 'log_probs' are of different responses")
        return self


@dataclass
class Entry:
    """The rewards of a prompt, the line they came from, its label as JSON, whether that line has all; and where that
    line begins in the file, if it has the responses' tokens.
    """

    rewards: array
    line: int
    label: str | None
    whole: bool
    start: int | None


class Stored(NamedTuple):
    """One response of a cache: its tokens, with EOS if it came, log-probabilities where it was drawn, and reward."""

    tokens: list[int]
    log_probs: list[float]
    reward: float


class Cache(dict[str, Entry]):
    """The rewards of a file, by prompt, in its order; ``record`` says how the samples were made, if it is known."""

    def __init__(self, path: Path, record: Record | None = None) -> None:
        super().__init__()
        self.path, self.record = path, record

    def samples(self, prompts: Iterable[str] | None = None) -> int:
        """How many rewards every one of ``prompts`` has; of all prompts if none are given. 0 for no prompts."""
        wanted = self if prompts is None else prompts
        return min((len(self[prompt].rewards) for prompt in wanted), default=0)

    def rewards(self, prompts: Sequence[str], samples: int = 0) -> Tensor:
        """The first ``samples`` rewards (0: as many as all have) of each of P prompts, ``[P, M]`` float64, each of
        float32.

        Raises ContentError if a prompt is not in the file, or has fewer rewards.
        """
        import torch

        samples = samples or self.samples()
        self.check(prompts, samples)
        rows = [torch.frombuffer(self[prompt].rewards[:samples], dtype=torch.float32) for prompt in prompts]
        return torch.stack(rows).double() if rows else torch.zeros(0, samples, dtype=torch.float64)

    def stored(self, prompt: str) -> list[Stored]:
        """The responses of a prompt, read from the file. Raises ContentError: the file has not their tokens."""
        start = self[prompt].start if prompt in self else None
        if start is None:
            raise ContentError(f"{self.path} has no tokens and log-probabilities of the prompt {shorten(prompt)}")
        with open_file(self.path) as file:
            file.seek(start)
            line = from_json(file.readline().decode("utf-8-sig"))  # looked at when the file was read
        return list(map(Stored, line["tokens"], line["log_probs"], line["rewards"]))

    def check(self, prompts: Sequence[str], samples: int = 0) -> None:
        """Raises ContentError if a prompt has not ``samples`` rewards, 0 for one: it names the first."""
        missing = [prompt for prompt in prompts if prompt not in self]
        if missing:
            others = f" (and of {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise ContentError(f"{self.path} has no rewards of the prompt {shorten(missing[0])}{others}")
        short = [prompt for prompt in prompts if len(self[prompt].rewards) < max(1, samples)]
        if short:
            entry = self[short[0]]
            others = f" (and {len(short) - 1} other prompts have too few)" if len(short) > 1 else ""
            raise ContentError(
                f"{self.path}, line {entry.line}: the prompt {shorten(short[0])} has {len(entry.rewards)} samples, "
                f"{samples} are asked for{others}"
            )

    def add(self, item: Any, number: int, start: int) -> None:
        """Take in what one line holds, the ``number``-th, which begins at the byte ``start``.

        Raises ContentError if it is not of a reward cache, not finite, or contradicts an earlier line.
        """
        where = f"{self.path}, line {number}"
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
            raise ContentError(
                f"{where} is not of a reward cache: each line is an object like "
                '{"prompt": "...", "responses": [...], "rewards": [...]}, or '
                '{"prompt": "...", "text": "...", "reward": 0.5}'
            )
        where, whole = f"{where}, prompt {shorten(item['prompt'])}", item.get("rewards") is not None
        if whole == (item.get("reward") is not None):
            both = "both 'reward' and 'rewards'" if whole else "neither 'rewards' nor 'reward'"
            raise ContentError(f"{where}: it has {both}")
        try:
            line = _Cached.model_validate(item if whole else {**item, "rewards": [item["reward"]]})
        except ValidationError as error:
            raise ContentError(f"{where}: {explain(error, _Cached)}") from error
        place = start if whole and line.tokens is not None else None
        new = Entry(array("f", line.rewards), number, label_text(line.label), whole, place)
        known = self.setdefault(line.prompt, new)
        if known is new:
            return
        if not new.whole and not known.whole:
            known.rewards.extend(new.rewards)
        elif (known.rewards, known.label, known.whole) != (new.rewards, new.label, new.whole):
            raise ContentError(f"{where}: line {known.line} has other rewards of the same prompt; delete one")

    def summary(self, prompts: Sequence[str]) -> str:
        """Mean reward, Best-of-N for N up to half the samples, and ties over ``prompts``, which are all there."""
        from bond_plugin.bestofn.distribution import quantiles
        from bond_plugin.bestofn.estimates import expected_max

        rewards = self.rewards(prompts, self.samples(prompts))
        m = rewards.shape[-1]
        below, not_above = quantiles(rewards, rewards)
        ties = (m * (not_above - below) - 1).mean().item() / max(1, m - 1)  # with the same reward, of the others
        flat = int((rewards == rewards[:, :1]).all(dim=-1).sum().item())
        means = {"mean reward": rewards} | {f"Best-of-{n}": expected_max(rewards, n) for n in _BEST_OF if 2 * n <= m}
        return "\n".join(
            [
                f"{len(prompts)} prompts x {m} samples",
                *(f"  {name:<14} {values.mean().item():10.4f}" for name, values in means.items()),
                f"  {'ties':<14} {ties:10.1%}   pairs of a prompt's samples with the same reward",
                f"  {'flat prompts':<14} {flat:10d}   all samples have the same reward: nothing to learn from",
            ]
        )


def read_cache(path: str | Path) -> Cache:
    """Read a file of ``bond cache`` or of the vBoN authors, whole.

    Raises ContentError for no such file, an empty one, or a line that :meth:`Cache.add` does not take.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            cache = _read(path, file)
    except OSError as error:
        raise ContentError(f"{path}: {reason(error)}") from error
    if not cache:
        raise ContentError(f"{path} has no rewards in it")
    return cache


def cached_responses(path: str | Path) -> list[str]:
    """The texts of all samples in a file that :func:`read_cache` takes; the files of others may have none."""
    with open_file(Path(path)) as file:
        items = [parse_json(line) for line in file if line.strip()]
    return [text for item in items for text in item.get("responses", [item["text"]] if "text" in item else [])]


def _read(path: Path, lines: Iterable[bytes]) -> Cache:
    cache, end = Cache(path), 0
    for number, line in enumerate(lines, start=1):
        start, end = end, end + len(line)
        if not line.strip():
            continue
        try:
            item = parse_json(line, finite=False)  # of a reward `add` says which prompt it is of
        except ValueError as error:
            if not line.endswith(b"\n") and cache.record is not None:
                raise ContentError(
                    f"{path}, line {number} is unfinished: `bond cache` was stopped while it wrote. Start it again "
                    "with the same flags, and it goes on there"
                ) from error
            raise ContentError(f"{path}, line {number} {error}") from error
        if number == 1 and isinstance(item, dict) and MARK in item:
            if item[MARK] != VERSION:
                raise ContentError(
                    f"{path} is a reward cache of version {item[MARK]}; this openrlhf-bond reads version {VERSION}"
                )
            cache.record = item
        else:
            cache.add(item, number, start)
    return cache


def differences(
    record: Record,
    run: Record,
    compared: Mapping[str, str] = COMPARED,
    where: tuple[str, str] = ("in the cache", "in this run"),
) -> list[str]:
    """What a run has otherwise than the record of a cache, in words.

    Models and rewards are compared by their hashes, and by name only where there is no hash.
    """
    found = []
    for key, name in compared.items():
        cached, now = record.get(key), run.get(key)
        if _identity(cached, now) != _identity(now, cached):
            found.append(f"{name}: {_describe(cached)} {where[0]}, {_describe(now)} {where[1]}")
    return found


def _identity(one: Any, other: Any) -> Any:
    """What of a part of a record decides: not the name, where both have a hash."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    ignored = {"name"} if one.get("sha256") and other.get("sha256") else {"sha256"}
    return {key: value for key, value in one.items() if key not in ignored}


def _describe(value: Any) -> str:
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    said = {key: text for key, text in value.items() if text not in (None, False)}
    parts = (str(text) if key in ("kind", "name") else f"{key} {text}" for key, text in said.items())
    return ", ".join(parts) or "none"


class Writer(LineFile):
    """Appends prompts to a cache, one line each, on the disk before :meth:`append` returns.

    Opening a file that exists goes on where it ends: a last line that was not finished is taken away, and ``cache``
    holds the prompts that are there. Nothing else is ever taken away or written twice.

    Raises:
        ContentError: the first line has another ``record`` (the message says what differs), or none.
        Busy, OSError: another process writes it, or it cannot be written.
    """

    def __init__(self, path: str | Path, record: Record) -> None:
        super().__init__(path)
        try:
            self.cache = self._resume({MARK: VERSION, **record})
        except BaseException:
            self._file.close()
            raise

    def append(
        self,
        prompt: str,
        rewards: Sequence[float],
        responses: Sequence[str] | None = None,
        label: Any = None,
        stored: tuple[list[list[int]], list[list[float]]] | None = None,
    ) -> None:
        """Write one prompt's line: M finite rewards, and of the responses the texts, tokens and log-probabilities.

        Raises ContentError if a reward is not finite in float32, or the prompt is there already. Nothing is written
        then.
        """
        import numpy

        if prompt in self.cache:
            raise ContentError(f"{self.path} has the prompt {shorten(prompt)} already")
        item: dict[str, Any] = {"prompt": prompt}
        if label_text(label) is not None:
            item["label"] = label
        if responses is not None:
            item["responses"] = list(responses)
        if stored is not None:
            item["tokens"], item["log_probs"] = stored[0], [[round(x, 6) for x in one] for one in stored[1]]
        # For people: the shortest number that is the same in float32, 0.1 and not 0.10000000149011612.
        item["rewards"] = [float(str(value)) for value in numpy.array(rewards, dtype=numpy.float32)]
        self.cache.add(item, len(self.cache) + 2, self._file.seek(0, os.SEEK_END))
        self.write(item)

    def _resume(self, record: Record) -> Cache:
        self._file.seek(0)
        if not _START.startswith(self._file.read(len(_START))):
            raise ContentError(f"{self.path} exists and is no file of `bond cache`: name another --cache.output")
        cache = _read(self.path, self.finished())
        if cache.record is None:  # new, or stopped in its first line
            self.write(record)
            return Cache(self.path, record)
        made = {key: f"--cache.{key}" for key in ("samples", "seed", "log_probs", "responses_key")}
        found = differences(cache.record, record)
        found += differences(cache.record, record, made, ("in the file", "now"))
        if found:
            lines = "\n".join(f"  - {line}" for line in found)
            raise ContentError(
                f"{self.path} was begun with other settings:\n{lines}\n"
                "Name another --cache.output, or delete the file"
            )
        return cache
