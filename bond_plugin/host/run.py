"""Run another of the host's commands with the hooks, so that it works on a machine without GPU too.

    python -m bond_plugin.host.run openrlhf.cli.train_sft --model.model_name_or_path … --data.dataset …
    python -m bond_plugin.host.run openrlhf.cli.train_rm …

takes the module's own flags. Without a launcher (``deepspeed``, ``torchrun``) it is a run of one process. Without
GPU ``--ds.param_dtype fp32`` is possible as well, which is faster there than bf16.
"""

from __future__ import annotations

import os
import runpy
import sys

_USAGE = "usage: python -m bond_plugin.host.run MODULE [the module's own flags], e.g. openrlhf.cli.train_sft --help"
#: What a launcher tells the only process of a run; 0 is a port that is free.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def main(argv: list[str]) -> int:
    """Run the module named by ``argv[0]``. Returns the exit status (2 for a wrong command line or host)."""
    if not argv or not argv[0].startswith("openrlhf."):
        print(_USAGE, file=sys.stderr)
        return 2
    from bond_plugin.host import hooks, launch, load_plugins
    from bond_plugin.registry import RegistryError

    try:
        launch.settle_device([])
        load_plugins()
        if "RANK" not in os.environ:
            os.environ.update(_ALONE)
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=False)
    except (RegistryError, hooks.HostMismatch) as error:
        print(f"bond: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
