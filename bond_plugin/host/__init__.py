"""The only part of the package that knows OpenRLHF, Ray, DeepSpeed and vLLM.

``hooks.py`` lists everything that is attached to the host, one line each, and checks the host against it. The other
files hold what is attached, one file for each thing.

Before Ray starts: ``flags`` (parser), ``plan`` (what the arguments ask for), ``inputs`` and ``checks`` (what is
refused), ``identity`` (whose checkpoints a folder holds), ``launch`` (Ray), ``run`` (the host's other commands).

In a run: ``sampling`` (rollouts), ``rewards`` (in the engines: samples and their rewards), ``advantages`` (from
samples to advantages, and reward transforms), ``log_probs`` (under other weights), ``loss`` (policy loss, and
micro-batches by tokens), ``weights`` (anchor and reference), ``checkpoints``, ``classifier`` (learned quantile),
``state`` (what is kept on the host's objects), ``metrics`` (what a run shows), ``watch`` (what has died), ``cpu``
(machines without GPU).

Importing this module is cheap, and :func:`load` imports nothing heavy either: it arms hooks which act when
a module of the host is imported. It may be called any number of times, in any process.
"""

from __future__ import annotations

import os
import sys

#: Set in every process of a run: ``cpu`` or ``cuda``.
DEVICE_VARIABLE = "BOND_DEVICE"
#: Set in every process of a run, so that other users of vLLM on the machine are left alone.
ACTIVE_VARIABLE = "BOND_ACTIVE"
#: Set in every process of a run with ``--reward.timeout``: seconds that a reward may take.
TIMEOUT_VARIABLE = "BOND_REWARD_TIMEOUT"
#: If set, names an executable that takes Python's command line, by which a run starts its processes in place of the
#: interpreter: that of ``benchmarks/prefork.py``, whose processes have the host imported when they start.
PYTHON_VARIABLE = "BOND_PREFORK_PYTHON"


def python() -> str:
    """The executable for a Python process on this machine."""
    return os.environ.get(PYTHON_VARIABLE, sys.executable)


def on_cpu() -> bool:
    """Whether this run was launched for machines without GPU."""
    return os.environ.get(DEVICE_VARIABLE) == "cpu"


def load() -> None:
    """The entry point of the group ``openrlhf.plugins``: arm the hooks in this process."""
    from bond_plugin.host import hooks, launch

    if DEVICE_VARIABLE not in os.environ:
        launch.settle_device(sys.argv[1:])  # the launching process, under a patched host
    hooks.arm()


def load_plugins() -> None:
    """Load every entry of ``openrlhf.plugins`` in this process. Ray runs this at the start of each worker.

    Raises:
        RegistryError: duplicate names, or an entry that cannot be imported.
    """
    from bond_plugin import registry

    for name in registry.names(registry.PLUGINS):
        registry.load(registry.PLUGINS, name)()


def load_in_vllm() -> None:
    """The entry point of the group ``vllm.general_plugins``: load plugins in vLLM's own processes of a run."""
    if os.environ.get(ACTIVE_VARIABLE):
        import threading

        from tqdm import tqdm

        from bond_plugin.host import watch

        watch.end_with_parent()
        tqdm.set_lock(threading.RLock())  # its own has a name in /dev/shm, which stays when the process is killed
        load_plugins()
