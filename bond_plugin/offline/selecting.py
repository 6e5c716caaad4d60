"""``bond select``: one of each prompt's responses, written as it is found, and what other N would have given."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from bond_plugin.bench.resampling import Estimate, Resampling
from bond_plugin.bestofn.selectors import SELECTORS, VOTES, expected, pick
from bond_plugin.files import ContentError, LineFile, open_file, parse_json, read_json, write_json
from bond_plugin.offline import engine
from bond_plugin.offline.reward_cache import MARK, Line, differences
from bond_plugin.rewards.answers import SelectionError
from bond_plugin.schema import explain
from bond_plugin.words import reason, shorten


class Selected(Line):
    """A line of the output, or of responses that are given."""

    answers: list[str | None] | None = None


def read_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Selected]:
    """The lines of a file of ``bond cache`` (its first, a record, is passed over), of ``bond select``, or of others.

    Raises ContentError if one is something else.
    """
    for number, line in enumerate(lines, start=1):
        try:
            item = parse_json(line) if line.strip() else {MARK: 1}
            if not (isinstance(item, dict) and MARK in item):
                yield Selected.model_validate(item)
        except ValidationError as error:
            raise ContentError(f"{path}, line {number}: {explain(error, Selected)}") from error
        except ValueError as error:
            raise ContentError(f"{path}, line {number} {error}") from error


def read_given(path: Path, samples: int) -> list[Selected]:
    """Responses that were sampled before, at least ``samples`` of each prompt. Raises ContentError if not."""
    try:
        with open_file(path) as file:
            found = list(read_lines(path, file))
    except OSError as error:
        raise ContentError(f"{path}: {reason(error)}") from error
    if not found:
        raise ContentError(f"{path} has no prompts in it")
    for line in found:
        if (there := len(line.responses or [])) < samples:
            raise ContentError(f"{path}: the prompt {shorten(line.prompt)} has {there} 'responses' of {samples}")
    return found


@contextlib.contextmanager
def output(path: Path, settings: dict[str, Any]) -> Iterator[tuple[LineFile, list[Selected]]]:
    """The output and what is there; beside it ``<name>.settings.json``, by which the same command goes on.

    Raises:
        ContentError: the file is not of these settings; the message says what differs. Nothing is changed.
        Busy, OSError: another process writes it, or it cannot be written.
    """
    with LineFile(path) as file:
        beside = path.with_name(f"{path.name}.settings.json")
        known = read_json(beside) if path.stat().st_size else settings
        if known is None:
            raise ContentError(f"{path} exists, and no {beside.name} beside it: name another --output")
        if found := differences(known, settings, {key: key for key in settings}, ("in the file", "now")):
            listed = "\n".join(f"  - {line}" for line in found)
            raise ContentError(f"{path} was begun with other settings:\n{listed}\nName another --output")
        write_json(beside, settings)
        yield file, list(read_lines(path, file.finished()))


def choose(
    args: argparse.Namespace, i: int, prompt: str, rewards: list[float] | None, answers: list[str | None] | None
) -> int:
    """The place of the response to the i-th prompt that the command's flags select.

    ``soft`` and ``--ties random`` draw it, each prompt with a seed of its own; else it is the first of equals. Raises
    SelectionError if votes cannot be weighted with these rewards.
    """
    generator = None
    if args.ties == "random" or args.selector == "soft":
        generator = torch.Generator().manual_seed(engine.seed(args.seed, "select", i))
    try:
        chances = SELECTORS[args.selector](*_tensors(rewards, answers), args.reward_temperature)
    except ValueError as error:
        raise SelectionError(f"--selector {args.selector}, the prompt {shorten(prompt)}: {error}") from error
    return pick(chances, generator)


def table(lines: Sequence[Selected], args: argparse.Namespace, right: Sequence[str] | None = None) -> str:
    """What each N would have given: the mean reward, and of 0/1 rewards or with ``right`` answers the accuracy.

    Each is a mean over prompts with its 95 % bootstrap interval, of :func:`~bond_plugin.bestofn.selectors.expected`.
    """
    sizes = [len(line.rewards or line.answers or []) for line in lines]
    tensors = [_tensors(line.rewards, line.answers) for line in lines]
    rewards = [one for one, _ in tensors]
    scored, parsed = all(line.rewards for line in lines), all(line.answers for line in lines)
    names = [name for name in SELECTORS if (scored or name == "majority") and (parsed or name not in VOTES)]
    if any((one < 0).any() for one in rewards):
        names = [name for name in names if name != "weighted"]
    binary = scored and all(((one == 0) | (one == 1)).all() for one in rewards)
    parts = {"accuracy": (rewards, names)} if binary else {}
    if scored and (right or not binary):
        parts["reward"] = (rewards, [name for name in names if name in ("best", args.selector)])
    if right:
        hits = [[float(one == known) for one in line.answers or []] for line, known in zip(lines, right, strict=True)]
        parts["accuracy"] = ([torch.tensor(one) for one in hits], names)
    text, resampling = [f"{len(lines)} prompts x {min(sizes)} responses"], Resampling(len(lines))
    for title, (values, columns) in parts.items():
        text += ["", (f"{title:<10}" + "".join(f"{name:<24}" for name in columns)).rstrip()]
        for n in sorted({*(2**i for i in range(min(sizes).bit_length())), min(sizes)}):
            found = [
                [
                    expected(name, *one, of_one, n, args.reward_temperature, engine.seed(args.seed, i, n))
                    for name in columns
                ]
                for i, (one, of_one) in enumerate(zip(tensors, values, strict=True))
            ]
            draws = resampling.mean(torch.tensor(found, dtype=torch.float64))
            cells = (f"{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in map(Estimate.of, draws.T))
            text.append((f"  N = {n:<4}" + "".join(f"{cell:<24}" for cell in cells)).rstrip())
    return "\n".join(text)


def _tensors(rewards: list[float] | None, answers: list[str | None] | None) -> tuple[Tensor, Tensor]:
    """Rewards and answers as selectors have them, each ``[N]``; without rewards zeros, without answers none."""
    known: dict[str, int] = {}
    count = len(rewards or answers or [])
    numbers = [-1 if one is None else known.setdefault(one, len(known)) for one in answers or [None] * count]
    return torch.tensor(rewards or [0.0] * count, dtype=torch.float64), torch.tensor(numbers)
