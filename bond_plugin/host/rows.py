"""Rows of experiences: how many a prompt has, and what training must know of each that the host has no place for."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from bond_plugin.algorithms.assemble import Rows
from bond_plugin.host import flags

#: Where ``Experience.info`` holds one :class:`Row` a row. Taken out before the host would log it.
ROWS = "bond_rows"


@dataclass(frozen=True)
class Row:
    """One response.

    Attributes:
        from_source: it is a source sample, not one of the policy.
        classifier_target: what the classifier is to say of it, in [0, 1]; ``None``: it is not trained on it.
    """

    from_source: bool
    classifier_target: float | None = None


def rows_of(args: SimpleNamespace) -> Rows:
    """The rows of a prompt."""
    algorithm = flags.algorithm(args)
    return Rows(args.rollout.n_samples_per_prompt, algorithm.needs().selected_samples if algorithm is not None else 0)
