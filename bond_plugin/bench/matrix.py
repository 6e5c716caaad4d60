"""The matrix of a comparison: algorithm x strength x seed, read from a YAML file.

    title: J-BOND against RLOO
    common:                      # flags of every cell, nested as in a recipe
      actor: {model_name_or_path: mini/model}
      ...
    evaluation:
      prompts: mini/heldout.jsonl
    seeds: [1, 2, 3]             # --train.seed
    methods:
      jbond:
        label: J-BOND
        flags: {algo: {advantage: {estimator: jbond}}}
        strength: {bond.gamma: [0, 0.5, 1]}
      rloo:
        label: RLOO
        flags: {algo: {advantage: {estimator: rloo}}}
        strength: {algo.kl.init_coef: [0.01, 0.1, 1]}

A strength is one flag or several with lists of values, of which every combination is run; or a list of mappings, of
which each is one point (for flags that go together). A method's flags win over the common ones, a strength's over
both. Whether the flags themselves are valid is for ``bond train --dry-run`` to say, cell by cell.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bond_plugin import recipe as recipes

#: What the runner sets for each cell.
RESERVED = ("ckpt.output_dir", "ckpt.path", "train.seed", "logger.tensorboard_dir")
_TOP = ("title", "common", "evaluation", "seeds", "methods")
_METHOD = ("label", "flags", "strength", "seeds")


class MatrixError(ValueError):
    """The file cannot be used. The message names the place and the fix."""


@dataclass(frozen=True)
class Evaluation:
    """How every policy is measured, the same for all.

    Attributes:
        prompts: JSON lines of held-out prompts.
        input_key, label_key: the keys of prompt and label in it.
        samples: responses a prompt of each policy.
        reference_samples: responses a prompt of the reference, for Best-of-N and the limits.
        quantile_samples: how many of them quantiles and the KLs to Best-of-N are taken among (the paper: 32).
        bon_levels: the N of those KLs.
        forward_samples: Best-of-N samples a prompt and level for the forward KL.
        seed: of the sampling.
        examples: prompts whose texts are shown.
    """

    prompts: str
    input_key: str = "input"
    label_key: str | None = None
    samples: int = 16
    reference_samples: int = 128
    quantile_samples: int = 32
    bon_levels: tuple[int, ...] = (4, 8, 16)
    forward_samples: int = 4
    seed: int = 1000
    examples: int = 4


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation."""

    method: str
    label: str
    strength: dict[str, Any]
    seed: int
    flags: dict[str, Any] = field(repr=False)
    """Dotted names and values: common, method, strength and seed, without what is in :data:`RESERVED`."""
    own: dict[str, Any] = field(repr=False)
    """The part of ``flags`` that is not common to all."""

    @property
    def name(self) -> str:
        """Unique in a matrix: ``jbond gamma=0.5 seed=1``."""
        point = [f"{key}={_short(value)}" for key, value in self.strength.items()]
        return " ".join([self.method, *point, f"seed={self.seed}"])

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name.replace("=", "")).strip("-")


@dataclass(frozen=True)
class Matrix:
    """A whole comparison.

    Attributes:
        cells: what is run, in this order, the first seeds of all methods first.
        others: cells that are not asked for now. Those that are finished are in the report.
    """

    title: str
    common: dict[str, Any]
    evaluation: Evaluation
    cells: tuple[Cell, ...]
    others: tuple[Cell, ...] = ()

    def only(self, methods: Sequence[str]) -> Matrix:
        """Of these methods alone; of all if there are none.

        Raises:
            MatrixError: the matrix has no such method.
        """
        known = {cell.method for cell in self.cells}
        for method in methods:
            if method not in known:
                raise MatrixError(f"--only {method}: the file has {', '.join(sorted(known))}")
        if not methods:
            return self
        chosen = tuple(cell for cell in self.cells if cell.method in methods)
        return replace(self, cells=chosen, others=tuple(cell for cell in self.cells if cell.method not in methods))


def read(path: Path) -> Matrix:
    """Read and check a matrix.

    Raises:
        MatrixError: the first problem found.
    """
    import yaml

    if not path.is_file():
        raise MatrixError(f"{path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=recipes.strict_loader(yaml))
    except yaml.YAMLError as error:
        raise MatrixError(f"{path}: not valid YAML: {error}") from error
    try:
        return parse(content)
    except MatrixError as error:
        raise MatrixError(f"{path}: {error}") from error


def parse(content: Any) -> Matrix:
    """The matrix of a parsed file. Raises as :func:`read` does, without the file's name."""
    top = _mapping(content, "the file", _TOP)
    for key in ("common", "evaluation", "methods"):
        if key not in top:
            raise MatrixError(f"'{key}' is missing (the file has: {', '.join(top) or 'nothing'})")
    common = _flags(top["common"], "common")
    evaluation = _evaluation(top["evaluation"])
    seeds = _seeds(top.get("seeds", [1]), "seeds")
    methods = _mapping(top["methods"], "methods", None)
    if not methods:
        raise MatrixError("methods: name at least one")
    rounds: list[tuple[int, Cell]] = []
    for key, given in methods.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", key):
            raise MatrixError(f"methods: '{key}' must be a short name of letters, digits, '-', '_', '.' and '+'")
        method = _mapping(given or {}, f"methods.{key}", _METHOD)
        own = _flags(method.get("flags") or {}, f"methods.{key}.flags")
        own_seeds = _seeds(method["seeds"], f"methods.{key}.seeds") if "seeds" in method else seeds
        for point, (place, seed) in itertools.product(
            _points(method.get("strength"), f"methods.{key}.strength"), enumerate(own_seeds)
        ):
            merged = {**own, **point}
            cell = Cell(
                method=key,
                label=str(method.get("label", key)),
                strength=_short_names(point),
                seed=seed,
                flags={**common, **merged},
                own=merged,
            )
            rounds.append((place, cell))
    # Every method with its first seed comes first: a comparison that is not finished yet compares all.
    cells = [cell for _, cell in sorted(rounds, key=lambda entry: entry[0])]
    seen: set[str] = set()
    for cell in cells:
        if cell.folder in seen:
            raise MatrixError(f"methods.{cell.method}: the cell '{cell.name}' is there twice")
        seen.add(cell.folder)
    return Matrix(str(top.get("title", "A comparison")), common, evaluation, tuple(cells))


def _mapping(node: Any, where: str, known: tuple[str, ...] | None) -> dict:
    if not isinstance(node, dict):
        raise MatrixError(f"{where} must be a mapping, found {type(node).__name__}")
    for key in node:
        if known is not None and key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f" (known: {', '.join(known)})"
            raise MatrixError(f"{where}: unknown key '{key}'{hint}")
    return node


def _flags(node: Any, where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    try:
        recipes.flatten(_mapping(node, where, None), flat)
    except recipes.RecipeError as error:
        raise MatrixError(f"{where}: {error}") from error
    for name in flat:
        if name in RESERVED:
            raise MatrixError(f"{where}: '{name}' is set for each cell; drop it")
    return flat


def _evaluation(node: Any) -> Evaluation:
    given = _mapping(node, "evaluation", tuple(one.name for one in fields(Evaluation)))
    if not isinstance(given.get("prompts"), str):
        raise MatrixError("evaluation.prompts must name a file of held-out prompts")
    if "bon_levels" in given:
        given = {**given, "bon_levels": tuple(_seeds(given["bon_levels"], "evaluation.bon_levels"))}
    made = Evaluation(**given)
    for name in ("samples", "reference_samples", "quantile_samples", "forward_samples", "seed", "examples"):
        value = getattr(made, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < (name in ("samples", "forward_samples")):
            raise MatrixError(f"evaluation.{name} must be a whole number, got {value!r}")
    if any(n < 2 for n in made.bon_levels):
        raise MatrixError("evaluation.bon_levels: Best-of-N needs N of at least 2")
    needed = made.quantile_samples + max(made.bon_levels, default=0) * made.forward_samples
    if made.quantile_samples < 2 or made.reference_samples < needed:
        raise MatrixError(
            f"evaluation.reference_samples must be at least {needed}: quantile_samples, of at least 2, and "
            f"forward_samples x the largest of bon_levels; got {made.reference_samples}"
        )
    return made


def _seeds(node: Any, where: str) -> list[int]:
    if not isinstance(node, list) or not node or any(not isinstance(s, int) or isinstance(s, bool) for s in node):
        raise MatrixError(f"{where} must be a list of whole numbers, got {node!r}")
    if len(set(node)) != len(node):
        raise MatrixError(f"{where}: {node} has a number twice")
    return node


def _points(node: Any, where: str) -> list[dict[str, Any]]:
    if node is None:
        return [{}]
    if isinstance(node, list):
        if not node:
            raise MatrixError(f"{where}: the list is empty")
        return [_flags(point, f"{where}[{i}]") for i, point in enumerate(node)]
    lists = _flags(node, where)
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise MatrixError(f"{where}.{name} must be a list of values, got {values!r}")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _short_names(point: dict[str, Any]) -> dict[str, Any]:
    """The last part of each dotted name, as far as they differ in it; ``kl.init_coef`` and its like keep two."""
    found = {}
    for name, value in point.items():
        last = name.rpartition(".")[2]
        unique = sum(other.rpartition(".")[2] == last for other in point) == 1
        found[_NAMES.get(name, last if unique else name)] = value
    return found


#: What readers call these.
_NAMES = {"algo.kl.init_coef": "kl_coef", "actor.adam.lr": "lr", "critic.adam.lr": "critic_lr"}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
