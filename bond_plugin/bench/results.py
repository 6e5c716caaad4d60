"""What ``bond bench`` wrote, read back: ``reference.json`` and ``results.jsonl`` of its output folder.

Everything that the report computes with is checked here, so that an error names the file, the line, the cell
and the key. P is the number of held-out prompts, M the number of samples of the reference policy for each.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, FiniteFloat, ValidationError, ValidationInfo, model_validator
from pydantic import Strict as StrictMode
from torch import Tensor
from typing_extensions import Self

from bond_plugin.files import ContentError, open_file, parse_json
from bond_plugin.schema import Open, Strict, explain
from bond_plugin.words import reason, shorten

REFERENCE, RESULTS = "reference.json", "results.jsonl"
#: Values of a policy that come one a prompt.
PER_PROMPT = ("reward", "win_rate", "kl", "quantile", "log_quantile", "entropy", "length")


class ResultsError(ContentError):
    """A results folder that the report cannot use. The message names file, place and fix."""


def _numbers(value: Any) -> Tensor:
    """Nested lists of finite numbers."""
    try:
        found = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"must hold lists of numbers of one length: {error}") from error
    if not found.isfinite().all():
        raise ValueError("holds a number that is not finite")
    return found


def _by_prompt(value: Any, info: ValidationInfo) -> Tensor:
    found, prompts = _numbers(value), info.context["prompts"]
    if found.shape != (prompts,):
        raise ValueError(f"must have the shape [{prompts}], got {list(found.shape)}")
    return found


ByPrompt = Annotated[Tensor, BeforeValidator(_by_prompt)]
ByN = dict[Annotated[int, StrictMode(False)], ByPrompt]
Logged = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Example(Strict):
    """One sample: the prompt, the response, and its reward."""

    prompt: str
    response: str
    reward: FiniteFloat


class Measured(Open):
    """A policy on the held-out prompts. Tensors are ``[P]`` float64, each entry a mean over samples."""

    reward: ByPrompt
    win_rate: ByPrompt  # against the reference's samples
    kl: ByPrompt  # KL(pi || pi_ref), nats a response
    quantile: ByPrompt  # of the policy's samples among the reference's
    log_quantile: ByPrompt  # nats
    entropy: ByPrompt  # nats a response
    length: ByPrompt  # tokens
    backward_kl: ByN  # N to KL(pi || pi_BoN), nats
    forward_kl: ByN  # N to KL(pi_BoN || pi), nats
    distinct_1: FiniteFloat  # share of distinct unigrams among the samples of a prompt
    distinct_2: FiniteFloat  # of bigrams
    pass_at: ByN = Field(default={})  # k to pass@k, for rewards of 0 and 1; empty for others

    @model_validator(mode="after")
    def _has_all_levels(self, info: ValidationInfo) -> Self:
        for key in ("backward_kl", "forward_kl"):
            if missing := set(info.context["levels"]) - set(getattr(self, key)):
                raise ValueError(f"'{key}' lacks N = {sorted(missing)} of 'bon_levels' in {REFERENCE}")
        return self


class Curve(Open):
    """Equally long lists; a value that was not logged is NaN."""

    generated_tokens: list[Logged]
    reward: list[Logged]
    kl: list[Logged]
    log_quantile: list[Logged]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        lengths = {key: len(getattr(self, key)) for key in Curve.model_fields}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise ValueError(f"the lists differ in length: {said}")
        return self


class Costs(Open):
    """What a run cost."""

    steps: int
    generated_tokens: int
    cached_tokens: int = 0  # of the reward cache that the run used, made before it and perhaps for other runs too
    seconds: FiniteFloat
    peak_memory_gib: Logged  # NaN where it was not measured
    curve: Curve

    @property
    def tokens(self) -> int:
        """All that were generated for it."""
        return self.generated_tokens + self.cached_tokens


class Result(Open):
    """One run of the matrix. A failed one has an ``error``, and neither ``training`` nor ``evaluation``."""

    cell: str
    method: str
    label: str
    strength: dict[str, Any]
    seed: int
    flags: dict[str, Any]
    status: Literal["done", "failed"]
    error: str | None = None
    training: Costs | None = None
    evaluation: Measured | None = None
    examples: list[Example] = Field(default=[])

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for key in ("training", "evaluation") if self.status == "done" else ("error",):
            if getattr(self, key) is None:
                raise ValueError(f"'{key}' is missing")
        return self


class Reference(Open):
    """The reference policy, and the settings that all cells have in common."""

    title: str
    command: str
    model: str
    reward: str
    max_new_tokens: int | None
    temperature: float
    quantile_samples: int
    bon_levels: list[int]
    prompts: Annotated[list[str], Field(min_length=1)]
    rewards: Annotated[Tensor, BeforeValidator(_numbers)]  # [P, M] float64
    evaluation: Measured
    examples: list[Example]

    @model_validator(mode="after")
    def _of_these_prompts(self) -> Self:
        shape = list(self.rewards.shape)
        if len(shape) != 2 or shape[0] != len(self.prompts) or shape[1] < 2:
            raise ValueError(f"'rewards' must have the shape [{len(self.prompts)}, at least 2], got {shape}")
        return self


@dataclass(frozen=True)
class Results:
    """A results folder. ``cells`` are in the matrix' order."""

    reference: Reference
    cells: list[Result]

    @property
    def done(self) -> list[Result]:
        return [cell for cell in self.cells if cell.error is None]


def read_results(folder: Path) -> Results:
    """Read and check ``folder``.

    Raises:
        ResultsError: a file is missing or is not JSON, a key is missing or has the wrong form, a list has not
            one entry a prompt, a number is not finite, or two cells have one name.
    """
    path = folder / REFERENCE
    content = _parse(b"".join(_lines(path)), str(path))
    given = {key: content.get(key) if isinstance(content, dict) else None for key in ("prompts", "bon_levels")}
    prompts, levels = (value if isinstance(value, list) else [] for value in given.values())
    context = {"prompts": len(prompts), "levels": [n for n in levels if isinstance(n, int)]}
    reference = checked(Reference, content, f"{path}:", context)

    path, cells = folder / RESULTS, {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        content = _parse(line, where)
        name = f" cell {shorten(content['cell'])}:" if isinstance(content, dict) and "cell" in content else ""
        cell = checked(Result, content, f"{where}:{name}", context)
        if cell.cell in cells:
            raise ResultsError(f"{where}: a second cell {cell.cell!r}; remove one of the two lines")
        cells[cell.cell] = cell
    if not cells:
        raise ResultsError(f"{path} has no cell: run `bond bench` first")
    # Methods that share a label are told apart by their keys.
    labels = Counter(label for _, label in {(cell.method, cell.label) for cell in cells.values()})
    for name, cell in cells.items():
        if labels[cell.label] > 1:
            cells[name] = cell.model_copy(update={"label": f"{cell.label} ({cell.method})"})
    return Results(reference, list(cells.values()))


_Model = TypeVar("_Model", bound=Strict)


def checked(model: type[_Model], content: Any, where: str, context: dict[str, Any]) -> _Model:
    """A reference or a result with so many ``prompts`` and such ``levels`` of Best-of-N as ``context`` says.

    Raises ResultsError, which begins with ``where``, if a key is missing or has the wrong form.
    """
    try:
        return model.model_validate(content, context=context)
    except ValidationError as error:
        raise ResultsError(f"{where} {explain(error, model)}") from error


def _lines(path: Path) -> list[bytes]:
    try:
        with open_file(path) as file:
            return file.readlines()
    except OSError as error:
        raise ResultsError(f"{path}: {reason(error)}; give the --output-dir of a `bond bench` run") from error


def _parse(content: bytes, where: str) -> Any:
    try:
        return parse_json(content, finite=False)  # the models say where a number is not
    except ValueError as error:
        raise ResultsError(f"{where} {error}; remove it, and run the same `bond bench` again") from error
