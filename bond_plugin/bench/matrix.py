"""The matrix of a comparison: algorithm x strength x seed, read from a YAML file.

    title: J-BOND against RLOO
    common:                      # flags of every cell, nested as in a recipe
      actor: {model_name_or_path: mini/model}
      ...
    evaluation:                  # how every policy is measured
      prompts: mini/heldout.jsonl
                                 # also: input_key, label_key, samples, reference_samples, quantile_samples,
                                 # bon_levels, forward_samples, seed, examples
    seeds: [1, 2, 3]             # --train.seed
    methods:
      jbond:
        label: J-BOND
        flags: {algo: {advantage: {estimator: jbond}}}
        strength: {bond.gamma: [0, 0.5, 1]}
        seeds: [1]               # instead of those above
      rloo:
        label: RLOO
        flags: {algo: {advantage: {estimator: rloo}}}
        strength: {algo.kl.init_coef: [0.01, 0.1, 1]}

A strength is one flag or several with lists of values, of which every combination is run; or a list of mappings, of
which each is one point (for flags that go together). A method's flags win over the common ones, a strength's over
both. A template that is in common is put around the held-out prompts. Whether the flags themselves are valid is for
`bond train --dry-run` to say, cell by cell.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator
from typing_extensions import Self

from bond_plugin import recipe as recipes
from bond_plugin.schema import Strict, explain
from bond_plugin.words import shorten

#: What the runner sets for each cell.
RESERVED = ("ckpt.output_dir", "ckpt.path", "train.seed", "logger.tensorboard_dir")


class MatrixError(ValueError):
    """The file cannot be used. The message names the place and the fix."""


# The file, as it is written.


def _flat(node: Any) -> dict[str, Any]:
    """Flags, nested or dotted, as dotted names and values."""
    node = {} if node is None else node
    if not isinstance(node, dict):
        raise ValueError(f"must be a mapping of flags, found {type(node).__name__}")
    flat: dict[str, Any] = {}
    recipes.flatten(node, flat)
    for name in flat:
        if name in RESERVED:
            raise ValueError(f"'{name}' is set for each cell; drop it")
    return flat


def _points(node: Any) -> list[dict[str, Any]]:
    """The points of a strength: those of a list, or every combination of the values of each flag."""
    if isinstance(node, list):
        if not node:
            raise ValueError("the list is empty")
        return [_flat(point) for point in node]
    lists = _flat(node)
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"'{name}' must be a list of values, got {shorten(values, 60)}")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _different(numbers: list[int]) -> list[int]:
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{numbers} has a number twice")
    return numbers


Flags = Annotated[dict[str, Any], BeforeValidator(_flat)]
Numbers = Annotated[list[int], Field(min_length=1), AfterValidator(_different)]
Count, Least = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.+-]*$")]


class Measuring(Strict):
    """How every policy is measured, the same for all."""

    prompts: str  # JSON lines of held-out prompts; the template of the runs is put around them
    input_key: str = "input"
    label_key: str | None = None
    samples: Least = 16  # responses a prompt of each policy
    reference_samples: Count = 128  # responses a prompt of the reference, for Best-of-N and the limits
    # How many of them quantiles and the KLs to Best-of-N are taken among (the paper: 32), and the N of those KLs.
    quantile_samples: Annotated[int, Field(ge=2)] = 32
    bon_levels: Annotated[list[Annotated[int, Field(ge=2)]], AfterValidator(_different)] = Field(default=[4, 8, 16])
    forward_samples: Least = 4  # Best-of-N samples a prompt and level for the forward KL
    seed: Annotated[int, Field(ge=0, lt=2**32 - 1)] = 1000  # of the sampling
    examples: Count = 4  # prompts whose texts are shown

    @model_validator(mode="after")
    def _enough(self) -> Self:
        needed = self.quantile_samples + max(self.bon_levels, default=0) * self.forward_samples
        if self.reference_samples < needed:
            raise ValueError(
                f"reference_samples must be at least {needed}: quantile_samples, and forward_samples x the largest "
                f"of bon_levels; got {self.reference_samples}"
            )
        return self


class _Method(Strict):
    label: str | None = None
    flags: Flags = Field(default={})
    strength: Annotated[list[dict[str, Any]], BeforeValidator(_points)] = Field(default=[{}])
    seeds: Numbers | None = None


class _File(Strict):
    title: str = "A comparison"
    common: Flags
    evaluation: Measuring
    seeds: Numbers = Field(default=[1])
    methods: Annotated[dict[Name, Annotated[_Method, BeforeValidator(lambda node: node or {})]], Field(min_length=1)]


# What is run.


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation."""

    method: str
    label: str
    strength: dict[str, Any]
    seed: int
    flags: dict[str, Any]  # dotted names and values: common, method and strength
    own: dict[str, Any]  # the part of them that is not common to all

    @property
    def name(self) -> str:
        """Unique in a matrix: ``jbond gamma=0.5 seed=1``."""
        point = [f"{key}={short(value)}" for key, value in self.strength.items()]
        return " ".join([self.method, *point, f"seed={self.seed}"])

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name.replace("=", "")).strip("-")


@dataclass(frozen=True)
class Matrix:
    """A whole comparison."""

    title: str
    evaluation: Measuring
    cells: tuple[Cell, ...]  # what is run, in this order, the first seeds of all methods first
    others: tuple[Cell, ...] = ()  # not asked for now; those that are finished are in the report

    def only(self, methods: Sequence[str]) -> Matrix:
        """Of these methods alone; of all if there are none. Raises MatrixError for one that is not in it."""
        known = {cell.method for cell in self.cells}
        for method in methods:
            if method not in known:
                raise MatrixError(f"--only {method}: the file has {', '.join(sorted(known))}")
        wanted = methods or known
        chosen, others = (
            tuple(cell for cell in self.cells if (cell.method in wanted) is asked) for asked in (True, False)
        )
        return replace(self, cells=chosen, others=others)


def read(path: Path) -> Matrix:
    """Read and check a matrix. Raises MatrixError for the first problem found."""
    try:
        return parse(recipes.load(path, typed=True))
    except (recipes.RecipeError, MatrixError) as error:
        raise MatrixError(f"{path}: {error}") from error


def parse(content: Any) -> Matrix:
    """The matrix of a parsed file. Raises as :func:`read` does, without the file's name."""
    try:
        given = _File.model_validate(content)
    except ValidationError as error:
        raise MatrixError(explain(error, _File)) from error
    labels = [method.label or key for key, method in given.methods.items()]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise MatrixError(f"methods: two have the label '{twice}', by which the report tells them apart")
    rounds: list[tuple[int, Cell]] = []
    for key, method in given.methods.items():
        for point, (place, seed) in itertools.product(method.strength, enumerate(method.seeds or given.seeds)):
            own = {**method.flags, **point}
            flags = {**given.common, **own}
            rounds.append((place, Cell(key, method.label or key, _short_names(point), seed, flags, own)))
    # Every method with its first seed comes first: a comparison that is not finished yet compares all.
    cells = [cell for _, cell in sorted(rounds, key=lambda entry: entry[0])]
    counts = Counter(cell.folder for cell in cells)
    for cell in cells:
        if counts[cell.folder] > 1:
            raise MatrixError(f"methods.{cell.method}: the cell '{cell.name}' is there twice")
    return Matrix(given.title, given.evaluation, tuple(cells))


def _short_names(point: dict[str, Any]) -> dict[str, Any]:
    """The last part of each dotted name, as far as they differ in it; ``kl.init_coef`` and its like keep two."""
    last = {name: name.rpartition(".")[2] for name in point}
    counts = Counter(last.values())
    return {_NAMES.get(name, last[name] if counts[last[name]] == 1 else name): value for name, value in point.items()}


#: What readers call these.
_NAMES = {"algo.kl.init_coef": "kl_coef", "actor.adam.lr": "lr", "critic.adam.lr": "critic_lr"}


def short(value: Any) -> str:
    """A value as the names of cells and points have it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
