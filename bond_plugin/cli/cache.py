"""``bond cache``: sample the initial policy, score the samples, and write the file for ``--bond.reward_cache``.

Takes the flags or the recipe of the training run and ``--cache.*``, and runs everything that ``bond train`` does
before it starts Ray; so what is checked there is checked here.
"""

from __future__ import annotations

from bond_plugin.cli import train


def main(argv: list[str]) -> int:
    """Make the cache. Returns the exit status: 2 for unusable flags, 1 if sampling or the reward fails."""
    return train.main(argv, command="bond cache")
