"""What ``bond bench`` wrote, read back: ``reference.json`` and ``results.jsonl`` of its output folder.

Everything that the report computes with is checked here, so that an error names the file, the line, the cell
and the key. P is the number of held-out prompts, M the number of samples of the reference policy for each.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REFERENCE, RESULTS = "reference.json", "results.jsonl"
#: Values of an evaluation that come one a prompt, under the names that they have in the files.
PER_PROMPT = ("reward", "win_rate", "kl", "quantile", "log_quantile", "entropy", "length")
#: Curves over a training run, beside the generated tokens.
CURVES = ("reward", "kl", "log_quantile")


class ResultsError(ValueError):
    """A results folder that the report cannot use. The message names file, place and fix."""


@dataclass(frozen=True)
class Example:
    """One sample: the prompt, the response, and its reward."""

    prompt: str
    response: str
    reward: float


@dataclass(frozen=True)
class Evaluation:
    """A policy on the held-out prompts. Tensors are ``[P]`` float64, each entry a mean over samples.

    Attributes:
        values: of each name in :data:`PER_PROMPT`. ``reward``; ``win_rate`` against the reference's samples;
            ``kl``, KL(pi || pi_ref), ``entropy`` (nats a response); ``quantile``, ``log_quantile`` (nats) of the
            policy's samples among the reference's; ``length`` (tokens).
        backward_kl, forward_kl: N to KL(pi || pi_BoN) and KL(pi_BoN || pi), nats.
        distinct_1, distinct_2: share of distinct uni- and bigrams among the samples of a prompt.
        pass_at: k to pass@k, for rewards of 0 and 1; empty for others.
    """

    values: dict[str, Tensor]
    backward_kl: dict[int, Tensor]
    forward_kl: dict[int, Tensor]
    distinct_1: float
    distinct_2: float
    pass_at: dict[int, Tensor]


@dataclass(frozen=True)
class Training:
    """What a run cost. ``curve`` has equally long lists under ``generated_tokens`` and :data:`CURVES`; a value
    that was not logged is NaN. ``peak_memory_gib`` is NaN where it was not measured. ``cached_tokens`` are those of
    the reward cache that the run used, made before it and perhaps for other runs too; 0 without one."""

    steps: int
    generated_tokens: int
    cached_tokens: int
    seconds: float
    peak_memory_gib: float
    curve: dict[str, list[float]]

    @property
    def tokens(self) -> int:
        """All that were generated for it."""
        return self.generated_tokens + self.cached_tokens


@dataclass(frozen=True)
class Cell:
    """One run of the matrix. A failed one has an ``error``, and neither ``training`` nor ``evaluation``."""

    name: str
    method: str
    label: str
    strength: dict[str, Any]
    seed: int
    flags: dict[str, Any]
    error: str | None
    training: Training | None
    evaluation: Evaluation | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Reference:
    """The reference policy, and the settings that all cells have in common.

    Attributes:
        rewards: ``[P, M]`` float64.
        settings: the remaining keys that are single values, in the file's order.
    """

    title: str
    command: str
    prompts: tuple[str, ...]
    rewards: Tensor
    bon_levels: tuple[int, ...]
    evaluation: Evaluation
    examples: tuple[Example, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A results folder. ``cells`` are in the matrix' order."""

    reference: Reference
    cells: tuple[Cell, ...]

    @property
    def done(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.error is None)

    @property
    def failed(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.error is not None)


def read_results(folder: Path) -> Results:
    """Read and check ``folder``.

    Raises:
        ResultsError: a file is missing or is not JSON, a key is missing or has the wrong form, a list has not
            one entry a prompt, a number is not finite, or two cells have one name.
    """
    reference = _reference(_Reader(_load(folder / REFERENCE), f"{folder / REFERENCE}:"))
    path = folder / RESULTS
    cells: list[Cell] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            cell = _cell(_Reader(_parse(line, f"{path}: line {number}"), f"{path}: line {number}:"), reference)
            if any(cell.name == other.name for other in cells):
                raise ResultsError(f"{path}: line {number}: a second cell {cell.name!r}; remove one of the two lines")
            cells.append(cell)
    if not cells:
        raise ResultsError(f"{path} has no cell: run `bond bench` first")
    return Results(reference, _told_apart(cells))


def _told_apart(cells: list[Cell]) -> tuple[Cell, ...]:
    """Methods that share a label get their keys added to it."""
    methods: dict[str, set[str]] = {}
    for cell in cells:
        methods.setdefault(cell.label, set()).add(cell.method)
    return tuple(
        replace(cell, label=f"{cell.label} ({cell.method})") if len(methods[cell.label]) > 1 else cell
        for cell in cells
    )


class _Reader:
    """A JSON object and the words by which errors name it."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ResultsError(f"{where} needs a JSON object, got {_short(content)}")
        self.content, self.where = content, where

    def get(self, key: str, *kinds: type) -> Any:
        if key not in self.content:
            raise ResultsError(f"{self.where} {key!r} is missing")
        value = self.content[key]
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ResultsError(f"{self.where} {key!r} must be {names}, got {_short(value)}")
        return value

    def inside(self, key: str) -> _Reader:
        return _Reader(self.get(key), f"{self.where} {key}:")

    def number(self, key: str) -> float:
        value = float(self.get(key, int, float))
        if not math.isfinite(value):
            raise ResultsError(f"{self.where} {key!r} is {value}")
        return value

    def tensor(self, key: str, *shape: int) -> Tensor:
        """A nested list of finite numbers in this shape; -1 takes any size."""
        try:
            found = torch.tensor(self.get(key, list), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ResultsError(f"{self.where} {key!r} must hold lists of numbers of one length: {error}") from error
        if found.dim() != len(shape) or any(
            want not in (-1, got) for want, got in zip(shape, found.shape, strict=False)
        ):
            asked = ", ".join("any" if size < 0 else str(size) for size in shape)
            raise ResultsError(f"{self.where} {key!r} must have the shape [{asked}], got {list(found.shape)}")
        if not found.isfinite().all():
            raise ResultsError(f"{self.where} {key!r} holds a number that is not finite")
        return found

    def by_n(self, key: str, prompts: int) -> dict[int, Tensor]:
        """``{"8": [P], ...}``, sorted by N."""
        inner = self.inside(key)
        try:
            names = {int(name): name for name in inner.content}
        except ValueError as error:
            raise ResultsError(f"{self.where} the keys of {key!r} must be whole numbers: {error}") from error
        return {n: inner.tensor(names[n], prompts) for n in sorted(names)}


def _reference(reader: _Reader) -> Reference:
    prompts = reader.get("prompts", list)
    if not prompts:
        raise ResultsError(f"{reader.where} 'prompts' is empty")
    rewards = reader.tensor("rewards", len(prompts), -1)
    if rewards.shape[1] < 2:
        raise ResultsError(f"{reader.where} 'rewards' needs at least two samples a prompt")
    levels = tuple(int(n) for n in reader.tensor("bon_levels", -1))
    for key in ("model", "reward", "max_new_tokens", "temperature", "quantile_samples"):
        reader.get(key)
    own = ("title", "command", "prompts", "rewards", "bon_levels", "evaluation", "examples", "key")
    return Reference(
        title=reader.get("title", str),
        command=reader.get("command", str),
        prompts=tuple(str(prompt) for prompt in prompts),
        rewards=rewards,
        bon_levels=levels,
        evaluation=_evaluation(reader.inside("evaluation"), len(prompts), levels),
        examples=_examples(reader),
        settings={
            key: value
            for key, value in reader.content.items()
            if key not in own and not isinstance(value, (dict, list))
        },
    )


def _cell(reader: _Reader, reference: Reference) -> Cell:
    name = reader.get("cell", str)
    reader = _Reader(reader.content, f"{reader.where} cell {name!r}:")
    status = reader.get("status", str)
    if status not in ("done", "failed"):
        raise ResultsError(f"{reader.where} 'status' must be 'done' or 'failed', got {status!r}")
    done, prompts = status == "done", len(reference.prompts)
    return Cell(
        name=name,
        method=reader.get("method", str),
        label=reader.get("label", str),
        strength=reader.get("strength", dict),
        seed=reader.get("seed", int),
        flags=reader.get("flags", dict),
        error=None if done else reader.get("error", str),
        training=_training(reader.inside("training")) if done else None,
        evaluation=_evaluation(reader.inside("evaluation"), prompts, reference.bon_levels) if done else None,
        examples=_examples(reader) if done else (),
    )


def _evaluation(reader: _Reader, prompts: int, levels: tuple[int, ...]) -> Evaluation:
    backward, forward = reader.by_n("backward_kl", prompts), reader.by_n("forward_kl", prompts)
    for key, found in (("backward_kl", backward), ("forward_kl", forward)):
        if missing := set(levels) - set(found):
            raise ResultsError(f"{reader.where} {key!r} lacks N = {sorted(missing)} of 'bon_levels' in {REFERENCE}")
    return Evaluation(
        values={key: reader.tensor(key, prompts) for key in PER_PROMPT},
        backward_kl=backward,
        forward_kl=forward,
        distinct_1=reader.number("distinct_1"),
        distinct_2=reader.number("distinct_2"),
        pass_at=reader.by_n("pass_at", prompts) if "pass_at" in reader.content else {},
    )


def _training(reader: _Reader) -> Training:
    curve = reader.inside("curve")
    lists = {
        key: [math.nan if value is None else float(value) for value in curve.get(key, list)]
        for key in ("generated_tokens", *CURVES)
    }
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        raise ResultsError(f"{curve.where} the lists differ in length: {lengths}")
    memory = reader.get("peak_memory_gib")
    return Training(
        steps=reader.get("steps", int),
        generated_tokens=reader.get("generated_tokens", int),
        cached_tokens=reader.get("cached_tokens", int) if "cached_tokens" in reader.content else 0,
        seconds=reader.number("seconds"),
        peak_memory_gib=math.nan if memory is None else reader.number("peak_memory_gib"),
        curve=lists,
    )


def _examples(reader: _Reader) -> tuple[Example, ...]:
    found = []
    for place, content in enumerate(reader.get("examples", list), start=1):
        one = _Reader(content, f"{reader.where} examples: number {place}:")
        found.append(Example(one.get("prompt", str), one.get("response", str), one.number("reward")))
    return tuple(found)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ResultsError(f"{path}: no such file; give the --output-dir of a `bond bench` run")
    return path.read_text(encoding="utf-8")


def _load(path: Path) -> Any:
    return _parse(_text(path), str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(
            f"{where} is not JSON ({error}); remove it, and run the same `bond bench` again"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
