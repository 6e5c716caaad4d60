"""Responses and their rewards from columns of the prompt data: ``bond cache --cache.responses_key``.

A row has a prompt with one of these under the two keys:

    ["...", ...], [0.5, ...]                    texts, or conversations that end with the response
    [..., {"content": "[...]"}], [0.5, ...]     a conversation that ends with the texts as one JSON list: so QRPO's
                                                authors published theirs
    "...", 0.5                                  one response; rows with the same prompt go together
"""

from __future__ import annotations

import json
from collections.abc import Generator
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from bond_plugin.files import ContentError
from bond_plugin.offline.engine import Progress, PromptSamples, prompt_tokens
from bond_plugin.offline.prompts import column
from bond_plugin.offline.reward_cache import Line, Reward
from bond_plugin.schema import explain
from bond_plugin.words import shorten

_LEAST = 2  # responses of a prompt: one alone has nothing to be compared with
_KINDS = [TypeAdapter(Annotated[list[kind], Field(min_length=1)]) for kind in (str, Reward)]


class Scored:
    """The responses of each prompt with their rewards: of those that fit the first ``--cache.samples``.

    A response fits if its tokens and EOS are no more than ``--rollout.max_new_tokens``: cut off there it would have
    no EOS, and a reward of its whole text. ``what`` says all of it in words, with how many are left out.

    Raises:
        ContentError: a row has something else (it is named with the column), or fewer than two of a prompt fit.
        DataError: the data has no such column.
    """

    def __init__(self, args: SimpleNamespace, tokenizer: Any) -> None:
        from tqdm import tqdm

        self._args, self._tokenizer = args, tokenizer
        self._rows, data = self._read(), args.data.prompt_dataset
        fitting = f"--rollout.max_new_tokens {args.rollout.max_new_tokens} with their EOS"
        every, longer, short = 0, 0, []
        rows = tqdm(self._rows.items(), desc="bond cache: lengths", unit="prompt", mininterval=5.0, delay=5.0)
        for prompt, (texts, rewards) in rows:
            room = self._prompt(prompt)[1]
            fits = [j for j, ids in enumerate(self._tokens(texts)) if room is None or len(ids) <= room]
            every, longer = every + len(texts), longer + len(texts) - len(fits)
            if len(fits) < _LEAST:
                short.append(f"the prompt {shorten(prompt)} has {len(fits)} responses")
            fits = fits[: args.cache.samples]
            self._rows[prompt] = [texts[j] for j in fits], [rewards[j] for j in fits]
        if short:
            others = f" (and {len(short) - 1} other prompts have too few)" if short[1:] else ""
            raise ContentError(
                f"{data}, '{args.cache.responses_key}': {short[0]} that fit {fitting}, and needs {_LEAST}{others}: "
                "give it more, or leave such prompts out of the data"
            )
        out = f" ({longer} of {every} do not fit {fitting}, and are left out)" if longer else ""
        self.what = f"up to {args.cache.samples} responses of {data}{out}"

    def draw(self, prompts: list[str], progress: Progress | None = None) -> Generator[list[PromptSamples]]:
        """As :func:`bond_plugin.offline.engine.stream` with one prompt in a chunk; no decoded queries.

        For log-probabilities the model is loaded on one device.
        """
        from bond_plugin.offline import likelihood

        args, done, wanted = self._args, 0, sum(len(self._rows[prompt][0]) for prompt in prompts)
        models = likelihood.load(args.actor.model_name_or_path) if args.cache.log_probs else []
        for prompt in prompts:
            texts, log_probs = self._rows[prompt][0], None
            before, ids = self._prompt(prompt)[0], self._tokens(texts)
            if models:
                made = likelihood.measure(models, [before], [ids], args.rollout.temperature, distributions=False)
                (found,) = made.by_token
                log_probs = [one.tolist() for one in found]
            done += len(texts)
            if progress is not None:
                progress(done, wanted)
            yield [PromptSamples(before, ids, [], texts, log_probs)]

    def score(self, prompt: str, label: Any, samples: PromptSamples) -> list[float]:
        """The rewards of what :meth:`draw` has of the prompt."""
        return self._rows[prompt][1]

    def _read(self) -> dict[str, tuple[list[str], list[float]]]:
        args, found = self._args, {}
        names = {flag: getattr(args.cache, flag) for flag in ("responses_key", "rewards_key")}
        columns = [column(args, self._tokenizer, name, f"--cache.{flag}") for flag, name in names.items()]
        for row, ((prompt, texts), (_, rewards)) in enumerate(zip(*columns, strict=True), start=1):
            try:
                new = _row(texts, rewards, list(names.values()))
            except ValueError as error:
                raise ContentError(f"{args.data.prompt_dataset}, row {row}, {error}") from error
            known = found.setdefault(prompt, ([], []))
            if known != new or not isinstance(rewards, list):  # a list that is there twice is one
                known[0].extend(new[0])
                known[1].extend(new[1])
        return found

    def _prompt(self, prompt: str) -> tuple[list[int], int | None]:
        return prompt_tokens(self._tokenizer, prompt, self._args.rollout.max_new_tokens, self._args.data.max_len)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """With EOS, which ``bond cache`` itself writes as a part of the text."""
        end = self._tokenizer.eos_token_id
        every = self._tokenizer(text=texts, add_special_tokens=False)["input_ids"]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in every]


def _row(texts: Any, rewards: Any, names: list[str]) -> tuple[list[str], list[float]]:
    """A row's responses and rewards. Raises ValueError, which names the column, if they are something else."""
    if not isinstance(rewards, list):
        texts, rewards = [texts], [rewards]
    elif _is_conversation(texts):
        try:
            texts = json.loads(texts[-1]["content"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{names[0]}': the conversation ends with no JSON list of texts: {error}") from error
    if isinstance(texts, list):
        texts = [one[-1]["content"] if _is_conversation(one) else one for one in texts]
    for name, values, kind in zip(names, (texts, rewards), _KINDS, strict=True):
        try:
            kind.validate_python(values, strict=True)
        except ValidationError as error:
            raise ValueError(f"'{name}': {explain(error, Line)}") from error
    if len(texts) != len(rewards):
        raise ValueError(f"'{names[0]}' and '{names[1]}': {len(texts)} responses, {len(rewards)} rewards")
    return texts, rewards


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[-1], dict) and "content" in value[-1]
