"""``bond``: one command, one module a subcommand."""

from __future__ import annotations

import importlib
import sys

from bond_plugin import __version__
from bond_plugin.words import did_you_mean

#: Subcommand: (module with ``main(argv) -> int``, one line of help).
COMMANDS = {
    "train": ("bond_plugin.cli.train", "train with OpenRLHF's own PPO trainer and any installed algorithm"),
    "cache": ("bond_plugin.cli.cache", "score samples of the initial policy once, for --bond.reward_cache"),
    "evaluate": ("bond_plugin.cli.evaluate", "compare two models on held-out prompts: reward, win rate, KL"),
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
    module, _ = COMMANDS[argv[0]]
    try:
        return importlib.import_module(module).main(argv[1:])
    except KeyboardInterrupt:
        print("bond: stopped by SIGINT", file=sys.stderr)
        return 130
