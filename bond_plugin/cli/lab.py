"""``bond lab``: every algorithm on an enumerable policy, beside the exact Best-of-N distribution."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bond_plugin import options
from bond_plugin.files import unwritable, write_whole
from bond_plugin.words import did_you_mean, timed

if TYPE_CHECKING:
    from bond_plugin.lab.learner import Training
    from bond_plugin.lab.methods import Method

_DESCRIPTION = """\
Train every algorithm on a policy and a reward small enough to enumerate (40 responses), and print next to each
other what they reach, computed exactly, without sampling:

  KL(pi||BoN)   backward KL from the policy to Best-of-N of the reference, nats a response
  KL(BoN||pi)   forward KL
  Jeffreys      half the sum of both
  reward        E[r], and the quantile of r among the reference's
  KL(pi||ref)   how far the policy is from the reference

The objects are those that `bond train` runs: their sample selection, advantages and policy loss, on batches
sampled from the enumerable policy. Without flags five tables are printed, in about a minute on one core:

  full          a policy that can be any distribution: who reaches Best-of-N
  restricted    one that cannot: forward KL, backward KL, and Jeffreys between them
  tied          0/1 rewards
  estimators    each gradient estimator's bias against the exact gradient
  sensitivity   how far from Best-of-N vBoN ends with M cached rewards

With --algorithm, one algorithm or reward transform of any installed package is run instead, with its own flags:
the test-bed for a new one. `bond lab --algorithm NAME --help` shows its flags.
"""

_EPILOG = """\
Written to --output-dir: lab.json (all numbers, with the way there) and lab.png. Files of an earlier `bond lab`
are replaced, others are not. The same flags give the same numbers.

examples:
  bond lab
  bond lab --algorithm bond --bond.n 4 --bond.beta 1 --bond.n_anchor_samples 64
  bond lab --algorithm vbon --vbon.bound exact --cached 300 --reward tied --output-dir lab-vbon
  bond lab --algorithm jbond --bond.eta 0.02 --steps 100 --n 4
  bond lab --algorithm bond --bond.target exponential --bond.temperature 0.25
"""

_MADE_BY = "bond lab"

#: Numbers that go with ``--algorithm``: their type, the least that makes sense, and their help.
_NUMBERS = {
    "n": (int, 2, "measure against Best-of-N of the reference (default: the algorithm's own target, else 4)"),
    "steps": (int, 1, "optimiser steps (default 160)"),
    "lr": (float, 0, "learning rate of Adam, above 0 (default 0.25)"),
    "prompts": (int, 1, "prompts a batch, all alike (default 256; 64 with cached rewards)"),
    "samples": (int, 1, "samples of the policy a prompt (default 8; 32 with cached rewards)"),
    "cached": (int, 1, "cached rewards of the reference a prompt, if used (default 300)"),
}


def main(argv: list[str]) -> int:
    """Run the laboratory. Returns the exit status: 2 for unusable flags, 1 if a method breaks its contract."""
    from bond_plugin.registry import RegistryError

    say = timed()
    parser = build_parser()
    name = options.last_value(argv, "--algorithm")
    method = training = None
    try:
        if name is not None:
            found, prefix = _class_of(name)
            _add_method_flags(parser, name, found, prefix)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_explain(unknown, parser, name))
        check(args)
        if name is not None:
            method = found(found.Config.from_flags(vars(args), prefix))
            training = _training(args, method)
    except (RegistryError, ValueError) as error:
        print(f"bond lab: error: {error}", file=sys.stderr)
        return 2

    import torch

    from bond_plugin.algorithms.assemble import ContractError
    from bond_plugin.algorithms.base import DataError
    from bond_plugin.lab import plots, programme, tables

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads are slower, and could change the last digit
    try:
        if method is None:
            say("training policies, then measuring estimators; about a minute")
            report = programme.programme(args.seed, say)
        else:
            n = args.n or programme.other_target(method) or getattr(method.config, "n", None) or 4
            say(f"training {name}: {training.steps} steps of {training.prompts} prompts x {training.samples} samples")
            report = programme.examine(
                name.rpartition(":")[2], method, n, training, args.policy or "full", args.reward or "strict"
            )
    except (ContractError, DataError, FloatingPointError, RegistryError) as error:
        print(f"bond lab: error: {name}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    written = [args.output_dir / "lab.json", args.output_dir / "lab.png"]
    write_whole(written[0], json.dumps({"made_by": _MADE_BY, **asdict(report)}, indent=1) + "\n")
    write_whole(written[1], plots.draw(report))
    print(f"\n{tables.text(report)}\n")
    say(f"written: {', '.join(map(str, written))}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags that do not depend on the algorithm."""
    parser = options.parser("lab", _DESCRIPTION, _EPILOG, allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path, default=Path("lab"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling (default %(default)s)")
    one = parser.add_argument_group("one algorithm")
    one.add_argument(
        "--algorithm",
        metavar="NAME",
        help="a name in the entry-point groups openrlhf.advantage_estimators or openrlhf.reward_transforms, or an "
        "algorithm's import path, package.module:Class",
    )
    only = parser.add_argument_group("with --algorithm only (without it, each method has settings that suit it)")
    only.add_argument(
        "--policy",
        choices=("full", "restricted"),
        help="'full' can be any distribution; 'restricted' has two parameters, and Best-of-N is out of its reach "
        "(default full)",
    )
    only.add_argument(
        "--reward",
        choices=("strict", "tied"),
        help="'strict': all responses differ; 'tied': 0 or 1 (default strict)",
    )
    for name, (kind, _, text) in _NUMBERS.items():
        only.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=text)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for the first problem of flags that do not depend on the algorithm, or of the folder."""
    given = [f"--{name}" for name in ("policy", "reward", *_NUMBERS) if getattr(args, name) is not None]
    if args.algorithm is None and given:
        raise ValueError(f"{given[0]} needs --algorithm NAME: without it every method has settings that suit it")
    options.at_least(vars(args), {"seed": 0} | {name: least for name, (_, least, _) in _NUMBERS.items()})
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be above 0, got {args.lr}")
    if args.seed > 2**40:
        raise ValueError(f"--seed must be at most 2^40, got {args.seed}")
    if args.n is not None and args.n > 10_000:
        raise ValueError(f"--n must be at most 10000, got {args.n}")

    folder = args.output_dir
    if problem := unwritable(folder):
        raise ValueError(f"--output-dir {problem}; name another folder")
    files = [path for path in (folder / "lab.json", folder / "lab.png") if path.exists()]
    if files and not _is_ours(folder / "lab.json"):
        raise ValueError(
            f"--output-dir {folder} has a {files[0].name} that `bond lab` did not write: name another folder, or "
            "move it away"
        )


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["made_by"] == _MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


# The algorithm and its flags.


def _class_of(name: str) -> tuple[type[Method], str]:
    """The class of a method, and what the flags of its settings begin with."""
    from bond_plugin.algorithms import Algorithm
    from bond_plugin.lab.methods import method_class

    found = method_class(name)
    return found, "bond" if issubclass(found, Algorithm) else name


def _add_method_flags(parser: argparse.ArgumentParser, name: str, found: type[Method], prefix: str) -> None:
    """Add the flags of the method's settings, as ``bond train`` does, without those that are about the host."""
    from bond_plugin.algorithms.base import reward_cache_flag
    from bond_plugin.lab.methods import CACHE

    cached = {
        "choices": (CACHE,),
        "default": CACHE if prefix != "bond" else "",  # a transform cannot do without
        "help": f"'{CACHE}': quantiles come from --cached rewards that the laboratory draws before training",
    }
    cache = reward_cache_flag().metadata["option"]
    group = parser.add_argument_group(f"{name} ({found.__module__})")
    for dotted, f in found.Config.options(prefix).items():
        if f.name not in _of_the_host():
            options.add_flag(group, dotted, f, **(cached if dotted == cache else {}))


def _of_the_host() -> set[str]:
    """The settings that every algorithm has."""
    from bond_plugin.algorithms import Config

    return {f.name for f in fields(Config)}


def _explain(unknown: list[str], parser: argparse.ArgumentParser, name: str | None) -> str:
    from bond_plugin import registry

    option = unknown[0].partition("=")[0]
    if not option.startswith("--"):
        return f"unexpected argument '{unknown[0]}'"
    bare = option[2:].removeprefix("no-")
    if bare.removeprefix("bond.") in _of_the_host():
        return f"{option} is about the host and has no effect here: drop it"
    if name is None and "." in option:
        return f"{option} is a flag of an algorithm: add --algorithm NAME"
    known = [*registry.names(registry.ADVANTAGE_ESTIMATORS), *registry.names(registry.REWARD_TRANSFORMS)]
    classes = ((other, *_class_of(other)) for other in known)
    owners = [f"--algorithm {other}" for other, found, prefix in classes if bare in found.Config.options(prefix)]
    if owners:
        return f"{option} belongs to {' and '.join(owners)}, not to {name}: drop it, or name that"
    hint = did_you_mean(option, parser._option_string_actions)
    return f"unknown flag {option}{hint or ' (see bond lab --help)'}"


def _training(args: argparse.Namespace, method: Method) -> Training:
    from bond_plugin.lab.programme import training_of

    given = {name: getattr(args, name) for name in _NUMBERS if name != "n" and getattr(args, name) is not None}
    training = replace(training_of(method, args.seed), **given)
    if getattr(method.config, "baseline", None) == "leave_one_out" and training.samples < 2:
        raise ValueError("--bond.baseline leave_one_out needs two samples a prompt: raise --samples")
    if training.prompts * training.samples < 2:
        raise ValueError("--prompts x --samples must be at least 2, for the baseline: raise one of them")
    return training
