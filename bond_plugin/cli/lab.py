"""``bond lab``: every algorithm on an enumerable policy, beside the exact Best-of-N distribution."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bond_plugin.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bond_plugin.lab import Method, Point, Report, Row, Table

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
"""

_MADE_BY = "bond lab"
#: Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
_PINK, _SKY, _AMBER, _BLACK = "#CC79A7", "#56B4E9", "#E69F00", "#000000"


class UsageError(ValueError):
    """A flag's value cannot be used. The message names the flag and what to do."""


def main(argv: list[str]) -> int:
    """Run the laboratory. Returns the exit status: 2 for unusable flags, 1 if a method breaks its contract."""
    started = time.monotonic()
    parser = build_parser()
    try:
        name = _value_of(argv, "--algorithm")
        if name is not None and ":" in name and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # an import path: a module in this folder is as good as an installed one
        found = None if name is None else _class_of(name)
        prefix = "bond"
        if found is not None:
            prefix = _add_method_flags(parser, name, found)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise UsageError(_explain(unknown, parser, name))
        check(args)
        method = None if found is None else _build(found, vars(args), prefix)
    except UsageError as error:
        print(f"bond lab: error: {error}", file=sys.stderr)
        return 2

    import torch

    from bond_plugin import lab
    from bond_plugin.registry import RegistryError

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {message}", flush=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads are slower, and could change the last digit
    try:
        if method is None:
            say("training policies, then measuring estimators; about a minute")
            report = lab.programme(args.seed, say)
        else:
            training, n = _settings(args, method)
            _trial(method, training)
            say(f"training {name}: {training.steps} steps of {training.prompts} prompts x {training.samples} samples")
            report = lab.examine(
                name.rpartition(":")[2], method, n, training, args.policy or "full", args.reward or "strict"
            )
    except UsageError as error:
        print(f"bond lab: error: {error}", file=sys.stderr)
        return 2
    except (lab.LabError, RegistryError) as error:
        print(f"bond lab: error: {name}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    written = [args.output_dir / "lab.json", args.output_dir / "lab.png"]
    write_whole(written[0], to_json(report) + "\n")
    plot(report, written[1])
    print(f"\n{format_report(report)}\n")
    say(f"written: {', '.join(map(str, written))}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags that do not depend on the algorithm."""
    parser = argparse.ArgumentParser(
        prog="bond lab",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    only.add_argument(
        "--n",
        type=int,
        metavar="N",
        help="measure against Best-of-N of the reference (default: the algorithm's own n, else 4)",
    )
    only.add_argument("--steps", type=int, help="optimiser steps (default 160)")
    only.add_argument("--lr", type=float, help="learning rate of Adam (default 0.25)")
    only.add_argument(
        "--prompts", type=int, metavar="P", help="prompts a batch, all alike (default 256; 64 with cached rewards)"
    )
    only.add_argument(
        "--samples", type=int, metavar="S", help="samples of the policy a prompt (default 8; 32 with cached rewards)"
    )
    only.add_argument(
        "--cached", type=int, metavar="M", help="cached rewards of the reference a prompt, if used (default 300)"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Look at the flags that do not depend on the algorithm, and at where the results go.

    Raises:
        UsageError: the first problem found.
    """
    alone = ("policy", "reward", "n", "steps", "lr", "prompts", "samples", "cached")
    given = [f"--{name}" for name in alone if getattr(args, name) is not None]
    if args.algorithm is None and given:
        raise UsageError(f"{given[0]} needs --algorithm NAME: without it every method has settings that suit it")
    least = {"seed": 0, "n": 2, "steps": 1, "prompts": 1, "samples": 1, "cached": 1}
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and value < limit:
            why = " (Best-of-1 is the reference itself)" if name == "n" else ""
            raise UsageError(f"--{name} must be at least {limit}{why}, got {value}")
    if args.seed > 2**40:
        raise UsageError(f"--seed must be at most 2^40, got {args.seed}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UsageError(f"--lr must be above 0, got {args.lr}")
    if args.n is not None and args.n > 10_000:
        raise UsageError(f"--n must be at most 10000, got {args.n}")

    folder = args.output_dir
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise UsageError(f"--output-dir {folder} is a file, or lies in one: name a folder")
    nearest = next(part for part in (folder, *folder.resolve().parents) if part.exists())
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--output-dir {folder} cannot be written: name another folder")
    files = [path for path in (folder / "lab.json", folder / "lab.png") if path.exists()]
    if files and not _is_ours(folder / "lab.json"):
        raise UsageError(
            f"--output-dir {folder} has a {files[0].name} that `bond lab` did not write: name another folder, or "
            "move it away"
        )


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == _MADE_BY


# The algorithm and its flags.


def _value_of(argv: list[str], option: str) -> str | None:
    found = None
    for i, token in enumerate(argv):
        if token == option and i + 1 < len(argv):
            found = argv[i + 1]
        elif token.startswith(option + "="):
            found = token.partition("=")[2]
    return found


def _class_of(name: str) -> type[Method]:
    from bond_plugin import registry
    from bond_plugin.lab import method_class

    try:
        return method_class(name)
    except registry.RegistryError as error:
        known = [*registry.names(registry.ADVANTAGE_ESTIMATORS), *registry.names(registry.REWARD_TRANSFORMS)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean --algorithm {close[0]}?" if close and name not in known else ""
        raise UsageError(f"--algorithm {name}: {error}{hint}") from error


def _add_method_flags(parser: argparse.ArgumentParser, name: str, found: type[Method]) -> str:
    """Add the flags of the method's settings, as ``bond train`` does; returns their prefix."""
    from bond_plugin.algorithms.base import Algorithm, reward_cache_flag
    from bond_plugin.lab import CACHE

    prefix = "bond" if issubclass(found, Algorithm) else name
    cache = reward_cache_flag().metadata["option"]
    group = parser.add_argument_group(f"{name} ({found.__module__})")
    for dotted, f in _options(found, prefix).items():
        kind: dict[str, Any] = {"type": type(f.default), "choices": f.metadata.get("choices")}
        if kind["choices"] is None:
            kind["metavar"] = {int: "N", float: "X"}.get(type(f.default), "TEXT")
        default, text = f.default, f.metadata.get("help", "")
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if dotted == cache:
            # A transform cannot do without; an algorithm can.
            default = CACHE if prefix != "bond" else ""
            kind = {"choices": (CACHE,)}
            text = f"'{CACHE}': quantiles come from --cached rewards that the laboratory draws before training"
        shown = default if default != "" else "none"
        group.add_argument(
            f"--{dotted}", default=default, help=f"{text} (default {shown})".replace("%", "%%"), **kind
        )
    return prefix


def _options(found: type[Method], prefix: str) -> dict[str, Any]:
    """The method's own settings, without those of every algorithm, which are about the host."""
    from bond_plugin.algorithms.base import Config

    of_the_host = {f.name for f in fields(Config)}
    return {dotted: f for dotted, f in found.Config.options(prefix).items() if f.name not in of_the_host}


def _explain(unknown: list[str], parser: argparse.ArgumentParser, name: str | None) -> str:
    from bond_plugin import registry
    from bond_plugin.algorithms.base import Config

    option = unknown[0].partition("=")[0]
    if not option.startswith("--"):
        return f"unexpected argument '{unknown[0]}'"
    bare = "bond." + option[2:].removeprefix("no-").removeprefix("bond.")
    if bare in Config.options("bond"):
        return f"{option} is about the host and has no effect here: drop it"
    if name is None and "." in option:
        return f"{option} is a flag of an algorithm: add --algorithm NAME"
    owners = [
        f"--algorithm {other}"
        for group, prefix in ((registry.ADVANTAGE_ESTIMATORS, "bond"), (registry.REWARD_TRANSFORMS, None))
        for other in registry.names(group)
        if option[2:].removeprefix("no-") in _class_of(other).Config.options(prefix or other)
    ]
    if owners:
        return f"{option} belongs to {' and '.join(owners)}, not to {name}: drop it, or name that"
    close = difflib.get_close_matches(option, list(parser._option_string_actions), n=1)
    return f"unknown flag {option}" + (f" (did you mean {close[0]}?)" if close else " (see bond lab --help)")


def _build(found: type[Method], values: dict[str, Any], prefix: str) -> Method:
    try:
        return found(found.Config.from_flags(values, prefix))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _settings(args: argparse.Namespace, method: Method) -> tuple[Any, int]:
    from bond_plugin import lab

    given = {name: getattr(args, name) for name in ("steps", "lr", "prompts", "samples", "cached")}
    training = replace(
        lab.training_of(method, seed=args.seed), **{name: value for name, value in given.items() if value is not None}
    )
    if getattr(method.config, "baseline", None) == "leave_one_out" and training.samples < 2:
        raise UsageError("--bond.baseline leave_one_out needs two samples a prompt: raise --samples")
    if training.prompts * training.samples < 2:
        raise UsageError("--prompts x --samples must be at least 2, for the baseline: raise one of them")
    return training, args.n or getattr(method.config, "n", None) or 4


def _trial(method: Method, training: Any) -> None:
    """One batch: a method that breaks its contract shows now."""
    from bond_plugin import lab

    problem = lab.Problem.make()
    lab.Learner(problem, method, problem.policy(), training).losses()


# What a reader sees.


def format_report(report: Report) -> str:
    """All tables as plain text, at most 118 columns, ending without a newline."""
    parts = [format_table(table) for table in report.tables.values()]
    if report.rounds:
        parts.append(format_rounds(report))
    parts.append(format_estimators(report))
    if report.cached:
        parts.append(format_cached(report))
    return "\n\n".join(parts)


def format_table(table: Table) -> str:
    """One table of policies."""
    lines = [
        f"{table.title} ({table.policy} policy, {table.rewards} rewards)",
        "",
        f"{'':<30}{'KL(pi||BoN)':>12}{'KL(BoN||pi)':>12}{'Jeffreys':>9}{'reward':>8}{'quantile':>9}"
        f"{'KL(pi||ref)':>12}",
    ]
    for row in table.rows:
        p = row.point
        lines.append(
            f"{row.name:<30}{p.kl_to_bon:>12.4f}{p.kl_from_bon:>12.4f}{p.jeffreys:>9.4f}{p.reward:>8.3f}"
            f"{p.quantile:>9.3f}{p.kl_ref:>12.3f}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def format_rounds(report: Report) -> str:
    """Iterative BOND beside the exact Best-of-n^m."""
    lines = [
        "Iterative BOND: the end of each period beside the exact Best-of-n^m of the reference",
        "",
        f"{'':<16}{'KL(pi||ref)':>13}{'exact':>8}{'reward':>9}{'exact':>8}{'worth Best-of':>15}{'off the curve':>15}",
    ]
    for r in report.rounds:
        lines.append(
            f"{f'Best-of-{r.n}':<16}{r.policy.kl_ref:>13.3f}{r.exact.kl_ref:>8.3f}{r.policy.reward:>9.3f}"
            f"{r.exact.reward:>8.3f}{r.worth:>15.2f}{r.gap:>+15.3f}"
        )
    return "\n".join(lines)


def format_estimators(report: Report) -> str:
    """Bias and noise of the gradient estimators."""
    lines = [
        "Estimators: the mean of 200 batches' gradients beside the exact gradient (% of its norm)",
        "",
        f"{'':<32}{'gradient of':<23}{'bias':>8}{'seen from':>11}{'noise':>8}{'cosine':>8}",
    ]
    for e in report.estimators:
        error = e.error
        bias = f"{error.bias:.1%}" if error.biased else "none"
        lines.append(
            f"{e.name:<32}{e.against:<23}{bias:>8}{error.resolution:>11.1%}{error.noise:>8.0%}{error.cosine:>8.3f}"
        )
    lines += [
        "",
        "bias: 'none' if 200 batches show none; 'seen from': the error of their mean; noise: one batch's deviation",
    ]
    return "\n".join(lines)


def format_cached(report: Report) -> str:
    """vBoN's distance from Best-of-N for each size of the cache."""
    bounds = list(dict.fromkeys(c.bound for c in report.cached))
    lines = [
        "Sensitivity to M: KL(pi||BoN) of vBoN's optimum with M cached rewards, mean and middle 90 % of 400 caches",
        "",
        f"{'M':>6}" + "".join(f"{f'vbon {bound}':>30}" for bound in bounds),
    ]
    for samples in dict.fromkeys(c.samples for c in report.cached):
        row = [c for c in report.cached if c.samples == samples]
        cells = "".join(f"{f'{c.kl_to_bon:.4f}  [{c.low:.4f}, {c.high:.4f}]':>30}" for c in row)
        lines.append(f"{samples:>6}{cells}")
    return "\n".join(lines)


def to_json(report: Report) -> str:
    """All numbers of a report, points with their Jeffreys divergence."""
    from bond_plugin.lab import Point

    def plain(value: Any) -> Any:
        if isinstance(value, Point):
            return {**asdict(value), "jeffreys": value.jeffreys}
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return json.dumps({"made_by": _MADE_BY, **plain(report)}, indent=1)


def plot(report: Report, path: Path) -> None:
    """Draw a report, one panel below the other so that it can be read on a phone; an existing file is replaced."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = "full" in report.tables
    draw = (_front, _directions, _convergence, _sensitivity) if everything else (_front, _both_directions)
    figure = Figure(figsize=(8, 6 * len(draw)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(draw), 1), draw, strict=True):
        panel(axes, report)
        axes.title.set_fontsize(14)
        axes.xaxis.label.set_fontsize(12)
        axes.yaxis.label.set_fontsize(12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    write_whole(path, buffer.getvalue())


def _line(axes: Axes, points: list[Point], of: Callable[[Point], tuple[float, float]], **style: Any) -> None:
    axes.plot(*zip(*map(of, points), strict=True), **style)


#: Row of the table "full": colour, marker, line style.
_STYLES = {
    "bond beta 1, k 16": (_BLUE, "o", "-"),
    "bond beta 0.5, k 16": (_GREEN, "s", "--"),
    "bond beta 0": (_ORANGE, "^", "-."),
    "vbon exact": (_BLACK, "x", ":"),
    "vbon l1": (_SKY, "v", "--"),
    "vbon exact, by 1/N": (_PINK, "D", "-."),
    "bond beta 1, without (B)": (_GREY, "P", ":"),
}


def _front(axes: Axes, report: Report) -> None:
    """Reward against the KL to the reference."""
    table = next(iter(report.tables.values()))

    def of(p: Point) -> tuple[float, float]:
        return p.kl_ref, p.reward

    rows = {row.name: row for row in table.rows}
    _line(axes, [p for _, p in report.curve], of, color=_GREY, linewidth=5, alpha=0.4, label="Best-of-N, exact")
    axes.set(title="Reward against KL to the reference", xlabel="KL(pi || ref), nats", ylabel="expected reward")
    if "full" not in report.tables:
        own = table.rows[2]
        _line(axes, own.trajectory, of, color=_BLUE, linewidth=2, label=own.name)
        axes.plot(*of(own.point), "o", color=_BLUE, markersize=9)
        axes.plot(*of(table.rows[1].point), "*", color=_ORANGE, markersize=16, label=table.rows[1].name)
        axes.legend(frameon=False, fontsize=11, loc="best")
        return
    jbond = rows["jbond pooled, eta 0.01"].trajectory
    _line(axes, jbond, of, color=_AMBER, linewidth=2, linestyle="--", label="J-BOND, eta 0.01")
    iterative = rows["bond n 2, periodic"].trajectory
    _line(axes, iterative, of, color=_BLUE, linewidth=1.2, label="iterative BOND, n = 2")
    _line(axes, [r.policy for r in report.rounds], of, color=_BLUE, marker="o", markersize=9, linestyle="none",
          label="  end of each period")  # fmt: skip
    _line(axes, [r.exact for r in report.rounds], of, color=_BLACK, marker="+", markersize=15, markeredgewidth=2,
          linestyle="none", label="Best-of-2, 4, 8, 16, exact")  # fmt: skip
    for r in report.rounds:
        axes.annotate(f"{r.n}", of(r.exact), (-4, 11), textcoords="offset points", fontsize=12, ha="right")
    axes.legend(frameon=False, fontsize=11, loc="upper left")
    inset = axes.inset_axes((0.5, 0.09, 0.48, 0.46))
    _line(inset, [p for _, p in report.curve], of, color=_GREY, linewidth=5, alpha=0.4)
    shown = [rows[name].point for name in _STYLES]
    for name, (colour, marker, _) in _STYLES.items():
        filled = {} if marker in "x+" else {"markerfacecolor": "none"}
        inset.plot(*of(rows[name].point), marker, color=colour, markersize=9, markeredgewidth=1.8, **filled,
                   label=name)  # fmt: skip
    xs, ys = [p.kl_ref for p in shown], [p.reward for p in shown]
    inset.set_xlim(min(xs) - 0.04, max(xs) + 0.27)
    inset.set_ylim(min(ys) - 0.1, max(ys) + 0.15)
    inset.set_title(f"fixed anchor: around Best-of-{table.n}", fontsize=11)
    inset.tick_params(labelsize=9)
    inset.legend(frameon=False, fontsize=8.5, loc="lower right")


def _directions(axes: Axes, report: Report) -> None:
    """Both KLs in the restricted class."""
    table = report.tables["restricted"]
    rows = [row for row in table.rows if row.name == "reference" or row.name.startswith("bond")]
    names = ["reference\n(start)", "beta = 0\nforward", "beta = 0.5\nJeffreys", "beta = 1\nbackward"]
    kinds = (
        ("KL(pi || BoN), backward", _BLUE, "", [row.point.kl_to_bon for row in rows]),
        ("KL(BoN || pi), forward", _ORANGE, "//", [row.point.kl_from_bon for row in rows]),
    )
    for i, (label, colour, hatch, heights) in enumerate(kinds):
        places = [x + (i - 0.5) * 0.4 for x in range(len(rows))]
        bars = axes.bar(places, heights, 0.36, color=colour, hatch=hatch, edgecolor="white", label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=11, padding=2)
        axes.axhline(heights[0], color=colour, linestyle="--", linewidth=1.2, zorder=0)
    axes.set_ylim(0, max(max(kind[3]) for kind in kinds) * 1.22)
    axes.set_xticks(range(len(rows)), names)
    axes.set(title="Restricted policy: both directions (dashed: the reference)", ylabel="nats")
    axes.legend(frameon=False, fontsize=11, loc="upper left", ncols=2)


def _convergence(axes: Axes, report: Report) -> None:
    """KL(pi || BoN) over the steps."""
    table = report.tables["full"]
    chosen = {**_STYLES, "jbond pooled, eta 0.01": (_AMBER, "", "-")}
    for name, (colour, marker, line) in chosen.items():
        row: Row = table.row(name)
        axes.plot(
            [p.step for p in row.trajectory],
            [p.kl_to_bon for p in row.trajectory],
            color=colour,
            linestyle=line,
            marker=marker or None,
            markevery=8,
            markersize=7,
            markerfacecolor="none" if marker not in ("x", "") else None,
            linewidth=1.8 if marker else 2.2,
            label=name if marker else "jbond pooled, eta 0.01 (goes on to larger N)",
        )
    axes.set_yscale("log")
    axes.set_ylim(top=30)
    axes.set(title=f"Convergence to Best-of-{table.n}", xlabel="step", ylabel="KL(pi || BoN), nats")
    axes.legend(frameon=False, fontsize=10, loc="upper center", ncols=2)


def _sensitivity(axes: Axes, report: Report) -> None:
    """KL(pi || BoN) of vBoN's optimum against the size of the cache."""
    styles = {"exact": (_BLACK, "x", "-"), "tied": (_BLUE, "o", "--"), "l1": (_ORANGE, "^", "-.")}
    for bound, (colour, marker, line) in styles.items():
        points = [c for c in report.cached if c.bound == bound]
        xs = [c.samples for c in points]
        axes.plot(xs, [c.kl_to_bon for c in points], color=colour, marker=marker, linestyle=line, markersize=8,
                  linewidth=2, label=f"vbon {bound}")  # fmt: skip
        axes.fill_between(xs, [c.low for c in points], [c.high for c in points], color=colour, alpha=0.12)
    axes.axvline(300, color=_GREY, linestyle=":", linewidth=1.5)
    axes.annotate("300, the paper's", (300, 0.97), (6, 0), xycoords=("data", "axes fraction"),
                  textcoords="offset points", fontsize=11, color=_GREY, va="top")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(title="How many cached rewards? (band: 90 % of caches)", xlabel="M, rewards of the reference a prompt",
             ylabel="KL(pi* || BoN), nats")  # fmt: skip
    axes.legend(frameon=False, fontsize=11, loc="lower left")


def _both_directions(axes: Axes, report: Report) -> None:
    """Both KLs over the steps of one method."""
    table = report.tables["one"]
    points = table.rows[2].trajectory
    _line(axes, points, lambda p: (p.step, p.kl_to_bon), color=_BLUE, linewidth=2, label="KL(pi || BoN), backward")
    _line(axes, points, lambda p: (p.step, p.kl_from_bon), color=_ORANGE, linewidth=2, linestyle="--",
          label="KL(BoN || pi), forward")  # fmt: skip
    axes.set_yscale("log")
    axes.set(title=table.title, xlabel="step", ylabel="nats")
    axes.legend(frameon=False, fontsize=11, loc="best")
