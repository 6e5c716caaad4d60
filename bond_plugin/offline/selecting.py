"""``bond select``: one of each prompt's responses, written as it is found, and what other N would have given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from typing_extensions import Self

from bond_plugin.bench.resampling import Estimate, Resampling
from bond_plugin.bestofn.selectors import SELECTORS, VOTES, expected, pick
from bond_plugin.files import ContentError, LineFile, open_file, parse_json, read_json, write_json
from bond_plugin.offline import engine
from bond_plugin.offline.answers import Parser, SelectionError
from bond_plugin.offline.prompts import label_text
from bond_plugin.offline.reward_cache import Reward, differences
from bond_plugin.schema import Open, explain
from bond_plugin.words import reason, shorten


class Line(Open):
    """Responses to a prompt that are given, and a line of the output; each has some of these."""

    prompt: Annotated[str, Field(min_length=1)]
    label: Any = None
    responses: Annotated[list[str], Field(min_length=1)] | None = None
    rewards: Annotated[list[Reward], Field(min_length=1)] | None = None
    answers: list[str | None] | None = None

    @model_validator(mode="after")
    def _of_the_same_responses(self) -> Self:
        if len({len(one) for one in (self.responses, self.rewards, self.answers) if one is not None}) > 1:
            raise ValueError("'responses', 'rewards' and 'answers' differ in length")
        return self


def read_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a file of ``bond cache`` (its first, a record, is passed over), of ``bond select``, or of others.

    Raises:
        ContentError: one is something else.
    """
    for number, line in enumerate(lines, start=1):
        try:
            item = parse_json(line) if line.strip() else {"bond_cache": 1}
            if not (isinstance(item, dict) and "bond_cache" in item):
                yield Line.model_validate(item)
        except ValidationError as error:
            raise ContentError(f"{path}, line {number}: {explain(error, Line)}") from error
        except ValueError as error:
            raise ContentError(f"{path}, line {number} {error}") from error


def read_given(path: Path, samples: int | None) -> list[Line]:
    """Responses that were sampled before: all, or the first ``samples`` of each prompt.

    Raises:
        ContentError: the file cannot be read, or a line is no use.
    """
    try:
        with open_file(path) as file:
            found = list(read_lines(path, file))
    except OSError as error:
        raise ContentError(f"{path}: {reason(error)}") from error
    if not found:
        raise ContentError(f"{path} has no prompts in it")
    for line in found:
        there = len(line.responses or [])
        if there < (samples or 1):
            raise ContentError(f"{path}: the prompt {shorten(line.prompt)} has {there} 'responses' of {samples or 1}")
    cut = [{key: (vars(line)[key] or [])[:samples] or None for key in ("responses", "rewards")} for line in found]
    return [line.model_copy(update=changes) for line, changes in zip(found, cut, strict=True)]


class Output(LineFile):
    """The output, and beside it ``<name>.settings.json``, by which the same command goes on where it was.

    Attributes:
        lines: what is there.

    Raises:
        ContentError: the file is not of these settings; the message says what differs. Nothing is changed.
        Busy, OSError: another process writes it, or it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        super().__init__(path)
        try:
            beside = path.with_name(f"{path.name}.settings.json")
            known = read_json(beside) if path.stat().st_size else settings
            if known is None:
                raise ContentError(f"{path} exists, and no {beside.name} beside it: name another --output")
            names = {key: key for key in settings}
            if found := differences(known, settings, names, ("in the file", "now")):
                listed = "\n".join(f"  - {line}" for line in found)
                raise ContentError(f"{path} was begun with other settings:\n{listed}\nName another --output")
            write_json(beside, settings)
            self.lines = list(read_lines(path, self.finished()))
        except BaseException:
            self._file.close()
            raise

    def write(self, item: Any) -> None:
        super().write(item)
        self.lines.append(Line.model_validate(item))


@dataclass(frozen=True)
class Selection:
    """How one of a prompt's responses is selected.

    Attributes:
        selector: of :data:`~bond_plugin.bestofn.selectors.SELECTORS`.
        temperature: of ``soft``.
        random: one is drawn; else the first of equals is taken, which is not for ``soft``.
        seed: of the draws, each with one of its own.
        parse: finds the answers, if they are wanted.
        clean: takes the special tokens from a response.
        keep: write all responses.
    """

    selector: str
    temperature: float
    random: bool
    seed: int
    parse: Parser | None
    clean: Callable[[str], str]
    keep: bool

    def line(self, i: int, prompt: str, label: Any, responses: list[str], rewards: list[float] | None) -> dict:
        """The line of the i-th prompt.

        Raises:
            SelectionError: votes cannot be weighted with these rewards.
        """
        answers = None if self.parse is None else [self.parse(self.clean(one)) for one in responses]
        generator = torch.Generator().manual_seed(engine.seed(self.seed, "select", i)) if self.random else None
        try:
            chances = SELECTORS[self.selector](*_tensors(rewards, answers, len(responses)), self.temperature)
        except ValueError as error:
            raise SelectionError(f"--selector {self.selector}, the prompt {shorten(prompt)}: {error}") from error
        j = pick(chances, generator)
        found = {
            "prompt": prompt,
            "label": None if label_text(label) is None else label,
            "response": self.clean(responses[j]),
            "reward": rewards and rewards[j],
            "selector": self.selector,
            "selected": j,
            "rewards": rewards,
            "answer": answers and answers[j],
            "answers": answers,
            "responses": responses if self.keep else None,
        }
        return {key: value for key, value in found.items() if value is not None}


def table(lines: Sequence[Line], selection: Selection, right: Sequence[str] | None = None) -> str:
    """What each N would have given: the mean reward, and of 0/1 rewards or with right answers the accuracy.

    Each is a mean over prompts with its 95 % bootstrap interval, of :func:`~bond_plugin.bestofn.selectors.expected`.

    Args:
        lines: of all prompts.
        selection: its selector and temperature are used.
        right: the right answer of each prompt, if it is known.
    """
    sizes = [len(line.rewards or line.answers or [0]) for line in lines]
    tensors = [_tensors(line.rewards, line.answers, k) for line, k in zip(lines, sizes, strict=True)]
    rewards = [one for one, _ in tensors]
    scored, parsed = all(line.rewards for line in lines), all(line.answers for line in lines)
    names = [name for name in SELECTORS if (scored or name == "majority") and (parsed or name not in VOTES)]
    if any((one < 0).any() for one in rewards):
        names = [name for name in names if name != "weighted"]
    binary = scored and all(((one == 0) | (one == 1)).all() for one in rewards)
    parts = {"accuracy": (rewards, names)} if binary else {}
    if scored and (right or not binary):
        parts["reward"] = (rewards, [name for name in names if name in ("best", selection.selector)])
    if right:
        hits = [[float(one == known) for one in line.answers or []] for line, known in zip(lines, right, strict=True)]
        parts["accuracy"] = ([torch.tensor(one) for one in hits], names)
    text, resampling = [f"{len(lines)} prompts x {min(sizes)} responses"], Resampling(len(lines))
    for title, (values, columns) in parts.items():
        text += ["", (f"{title:<10}" + "".join(f"{name:<24}" for name in columns)).rstrip()]
        for n in sorted({*(2**i for i in range(min(sizes).bit_length())), min(sizes)}):
            found = [
                [
                    expected(name, *one, of_one, n, selection.temperature, engine.seed(selection.seed, i, n))
                    for name in columns
                ]
                for i, (one, of_one) in enumerate(zip(tensors, values, strict=True))
            ]
            draws = resampling.mean(torch.tensor(found, dtype=torch.float64))
            cells = (f"{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in map(Estimate.of, draws.T))
            text.append((f"  N = {n:<4}" + "".join(f"{cell:<24}" for cell in cells)).rstrip())
    return "\n".join(text)


def _tensors(rewards: list[float] | None, answers: list[str | None] | None, count: int) -> tuple[Tensor, Tensor]:
    """Rewards and answers as selectors have them, each ``[count]``; without rewards zeros, without answers none."""
    known: dict[str, int] = {}
    numbers = [-1 if one is None else known.setdefault(one, len(known)) for one in answers or [None] * count]
    return torch.tensor(rewards or [0.0] * count, dtype=torch.float64), torch.tensor(numbers)
