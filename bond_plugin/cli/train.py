"""``bond train``: the host's own training command with every installed algorithm in it.

Takes every flag of ``openrlhf.cli.train_ppo_ray`` unchanged, ``--bond.*`` for the selected algorithm,
``--recipe`` and ``--dry-run``.
"""

from __future__ import annotations

import sys


def main(argv: list[str], command: str = "bond train") -> int:
    """Train, or do what another command does with the flags of training. Returns the exit status."""
    from bond_plugin.host import hooks, launch
    from bond_plugin.registry import RegistryError

    try:
        launch.run_host(argv, command)
    except AssertionError as error:
        if launch.started():
            raise
        print(f"bond: error: {error} (the host's own check of its flags)", file=sys.stderr)
        return 2
    except (RegistryError, hooks.HostMismatch) as error:
        print(f"bond: error: {error}", file=sys.stderr)
        return 2
    return 0
