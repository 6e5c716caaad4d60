"""``bond``: one command, one module a subcommand."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from bond_plugin import __version__
from bond_plugin.files import ContentError
from bond_plugin.words import did_you_mean, reason

#: Subcommand: (module with ``main(argv) -> int``, one line of help).
COMMANDS = {
    "train": ("bond_plugin.cli.train", "train with OpenRLHF's own PPO trainer and any installed algorithm"),
    "cache": ("bond_plugin.cli.cache", "score samples of the initial policy once, for --bond.reward_cache"),
    "evaluate": ("bond_plugin.cli.evaluate", "compare two models on held-out prompts: reward, win rate, KL"),
    "select": ("bond_plugin.cli.select", "sample N responses a prompt and select one: Best-of-N, or a vote"),
    "bench": ("bond_plugin.cli.bench", "compare algorithms: reward and win rate against KL, with a report"),
    "recipes": ("bond_plugin.cli.recipes", "list the recipes that come with the package, or print one"),
    "lab": ("bond_plugin.cli.lab", "run every algorithm where Best-of-N is known exactly: a minute, no GPU"),
}

_USAGE = f"""\
usage: bond COMMAND [flags]

Best-of-N quality from a single sample, inside OpenRLHF (openrlhf-bond {__version__}).

commands:
{chr(10).join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())}

examples:
  bond train --recipe recipes/reviews/jbond-cpu.yaml
  bond train --algo.advantage.estimator jbond <the flags of openrlhf.cli.train_ppo_ray>
  bond train --recipe FILE.yaml --bond.beta 0.25 --dry-run
  cp -r "$(bond recipes --path)" recipes      the recipes, where there is no clone

`bond COMMAND --help` explains a command's flags; `bond --version` prints the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status (2 for a wrong command line)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("bond: stopped by SIGINT", file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        _nothing_more_to_print()  # `bond recipes | head` has seen enough
        return 0
    except OSError as error:
        if type(error).__module__.startswith("ray."):  # of a worker: Ray has put that one's traceback into it
            raise
        said = reason(error)
        if error.filename is not None:
            said = f"{error.filename}: {said}"
        elif error.errno == errno.ENOSPC:  # all files of ours are named: it is the standard output's
            _nothing_more_to_print()
            said = f"the standard output: {said}"
    except ContentError as error:
        said = str(error)
    print(f"bond {' '.join(argv[:1])}: error: {said}", file=sys.stderr)
    return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"openrlhf-bond {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(f"bond {argv[0]}", [f"bond {name}" for name in COMMANDS])
        print(f"bond: error: unknown command '{argv[0]}'{hint} (see bond --help)", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


def _nothing_more_to_print() -> None:
    """Else Python tries once more as it leaves, and fails with a message of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
