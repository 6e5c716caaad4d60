"""``bond cache``: sample the initial policy, score the samples, and write the file for ``--bond.reward_cache``.

Takes the flags or the recipe of the training run and ``--cache.*``, which are resolved and checked as ``bond train``
does it before it starts Ray.
"""

from __future__ import annotations

from bond_plugin.cli import train


def main(argv: list[str]) -> int:
    """Make the cache. Returns the exit status: 2 for unusable flags, 1 if sampling or the reward fails."""
    from bond_plugin.host import launch
    from bond_plugin.offline import make_cache

    try:
        return train.main(argv, command="bond cache")
    except launch.Resolved as found:
        return make_cache.make(found.arguments)
