"""What training must know of each row of an experience that the host has no place for."""

from __future__ import annotations

from dataclasses import dataclass

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
