"""The picture of a report."""

from __future__ import annotations

import io
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bond_plugin.lab.problem import Point
from bond_plugin.lab.programme import Report

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
_PINK, _SKY, _AMBER, _BLACK = "#CC79A7", "#56B4E9", "#E69F00", "#000000"


def draw(report: Report) -> bytes:
    """A report as a PNG, one panel below the other so that it can be read on a phone."""
    everything = "full" in report.tables
    panels = (_front, _directions, _convergence, _sensitivity) if everything else (_front, _both_directions)
    figure = Figure(figsize=(8, 6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1), panels, strict=True):
        panel(axes, report)
        axes.title.set_fontsize(14)
        axes.xaxis.label.set_fontsize(12)
        axes.yaxis.label.set_fontsize(12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _line(axes: Axes, points: list[Point], of: Callable[[Point], tuple[float, float]], **style: Any) -> None:
    axes.plot(*zip(*map(of, points), strict=True), **style)


def _marker(marker: str) -> dict[str, str]:
    return {"marker": marker} if marker == "x" else {"marker": marker, "markerfacecolor": "none"}


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
    table, of = next(iter(report.tables.values())), attrgetter("kl_ref", "reward")
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
        look = {"color": colour, "linestyle": "none", **_marker(marker)}
        inset.plot(*of(rows[name].point), markersize=9, markeredgewidth=1.8, label=name, **look)
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
    rows, of = {row.name: row.trajectory for row in table.rows}, attrgetter("step", "kl_to_bon")
    for name, (colour, marker, line) in _STYLES.items():
        look = {"color": colour, "linestyle": line, "linewidth": 1.8, **_marker(marker)}
        _line(axes, rows[name], of, markevery=8, markersize=7, label=name, **look)
    name = "jbond pooled, eta 0.01"
    _line(axes, rows[name], of, color=_AMBER, linewidth=2.2, label=f"{name} (goes on to larger N)")
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
    points, aim = table.rows[2].trajectory, "BoN" if table.n else "aim"
    backward, forward = attrgetter("step", "kl_to_bon"), attrgetter("step", "kl_from_bon")
    _line(axes, points, backward, color=_BLUE, linewidth=2, label=f"KL(pi || {aim}), backward")
    _line(axes, points, forward, color=_ORANGE, linewidth=2, linestyle="--", label=f"KL({aim} || pi), forward")
    axes.set_yscale("log")
    axes.set(title=table.title, xlabel="step", ylabel="nats")
    axes.legend(frameon=False, fontsize=11, loc="best")
