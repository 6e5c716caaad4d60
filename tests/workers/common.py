"""What workers share that run the host's own classes: the hooks, and the host's arguments."""

import contextlib
import io
from types import SimpleNamespace

import device  # noqa: F401, before anything of the host

# isort: split
from bond_plugin.cli import train
from bond_plugin.host import flags


def arguments(argv: list[str]) -> SimpleNamespace:
    """The host's arguments, as its own parser and our checks leave them before Ray starts."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        train.main([*argv, "--dry-run"])
    return flags.current().args


def optimiser(part: SimpleNamespace, kind: str = "adam") -> dict:
    """The configuration that the host hands to ``strategy.prepare``."""
    return {
        "optim": kind, "muon": vars(part.muon), "adam": vars(part.adam), "lr_scheduler": "linear",
        "lr_warmup_ratio": 0.0, "max_norm": 0.0, "scheduler_steps": 100,
    }  # fmt: skip
