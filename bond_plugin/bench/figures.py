"""The report's pictures: fronts, training curves, cost. Nothing is computed here beyond what is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and a dark violet; each method also has its
own marker and line style. Pictures are narrow, so that their text can be read on a telephone. matplotlib is imported
here, without a display.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from bond_plugin.bench.results import Result
from bond_plugin.bench.summary import Method, Policy, Summary
from bond_plugin.bestofn.limits import interpolate, over_root

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4B2E83")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.2)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 3)),
    (0, (1, 1, 4, 1)),
    (0, (3, 3)),
)
_STRENGTH_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 1.5)))
_Look = dict[str, Any]  # arguments of a line of matplotlib's
_OPACITIES = (1.0, 0.8, 0.65, 0.55, 0.5)
_BLACK, _GREY, _SHADE = "#1a1a1a", "#595959", "#ececec"

#: What the measures and curves are called on an axis.
NAMES = {
    "reward": "mean reward",
    "win_rate": "win rate against the reference",
    "kl": r"KL($\pi\,\Vert\,\pi_\mathrm{ref}$), nats a response",
    "log_quantile": "log quantile, nats",
}
OPTIMUM = "optimum of RL with a KL penalty"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "bond bench",  # the same numbers give the same file
}


def svg(figure: Figure) -> bytes:
    """The figure as SVG, text as outlines, without date or creator."""
    return _saved(figure, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def png(figure: Figure) -> bytes:
    return _saved(figure, "png", dpi=150)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it stays, and is half of the work
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _looks(summary: Summary) -> list[tuple[Method, _Look]]:
    """The methods, each with its colour, marker and line style."""
    cycles = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), itertools.cycle(_LINES), strict=False)
    looks = ({"color": colour, "marker": marker, "linestyle": line} for colour, marker, line in cycles)
    return list(zip(summary.methods, looks, strict=False))


# Fronts.


def front(summary: Summary, measure: str) -> Figure:
    """``measure`` against the KL: all points with their intervals, Best-of-N, and the limit."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 6.2), layout="constrained")
        axes = figure.subplots()
        # Beyond all points, and beyond Best-of-4 if the points are few and near.
        last = max((point.estimates["kl"].high for point in summary.points), default=0.0)
        fourth = summary.best_of[max(n for n in summary.best_of if n <= 4)]["kl"].value
        right = 1.12 * max(last, fourth, 1e-3)
        top = _limit(axes, summary, measure, right)
        _best_of_n(axes, summary, measure, right)
        if measure == "win_rate":  # in reward it is the limit
            kl, value = (part[summary.tilted[0] <= right] for part in summary.tilted)
            axes.plot(kl, value, color=_GREY, linewidth=1.3, linestyle=(0, (6, 2, 1.5, 2)), label=OPTIMUM, zorder=2)
        for method, look in _looks(summary):
            look |= {"xerr": _whiskers(method.points, "kl"), "linewidth": 1.5, "zorder": 3}
            _points(axes, method, look, measure, [point.kl for point in method.points])
        values = torch.tensor([point.estimates[measure].value for point in summary.points], dtype=torch.float64)
        below, above = _whiskers(summary.points, f"{measure}_gain")
        lowest = min(summary.limits[measure].base, (values - below).min().item())
        highest = max(top, (values + above).max().item())
        margin = 0.06 * max(highest - lowest, 1e-9)
        axes.set(xlim=(-0.02 * right, right), ylim=(lowest - margin, highest + margin))
        axes.set(xlabel=NAMES["kl"], ylabel=NAMES[measure])
        _legend_below(figure, axes, summary)
        return figure


def _limit(axes: Axes, summary: Summary, measure: str, right: float) -> float:
    """Draw the limit up to ``right``; return its highest value there."""
    limit = summary.limits[measure]
    # Evenly spaced in the root of the KL, in which the limit is nearly a straight line.
    kl = right * torch.linspace(0, 1, 200, dtype=torch.float64) ** 2
    value, supported = limit.at(kl), limit.supported_at(kl)
    axes.plot(kl[supported], value[supported], color=_BLACK, linewidth=1.6, label="limit at this KL", zorder=2)
    if not supported.all():
        start = limit.kl[limit.supported].max().item()
        beyond = (kl >= start) & value.isfinite()
        axes.axvspan(
            start, right, color=_SHADE, linewidth=0, zorder=0, label="too few reference samples for the limit"
        )
        axes.plot(kl[beyond], value[beyond], color=_BLACK, linewidth=1.6, linestyle=(0, (4, 3)), zorder=2)
    return value[value.isfinite()].max().item()


def _best_of_n(axes: Axes, summary: Summary, measure: str, right: float) -> None:
    """The curve, a tick at each N of the table, and N itself above the limit, where no other mark can be."""
    kls, rewards, win_rates = summary.curve.mean()
    values = {"reward": rewards, "win_rate": win_rates}[measure]
    at = torch.linspace(0, 1, 200, dtype=torch.float64) ** 2 * min(right, kls[-1].item())
    between = over_root(at[None], kls[None], values[None])[0]
    axes.plot(at, between, color=_GREY, linewidth=1.3, linestyle=":", zorder=2)
    axes.plot([], [], color=_GREY, linewidth=1.3, linestyle=":", marker="|", label="Best-of-N of the reference")
    placed = -math.inf
    for n, estimates in summary.best_of.items():
        kl, value = estimates["kl"].value, estimates[measure].value
        if kl > right:
            break
        axes.plot([kl], [value], color=_GREY, marker="|", markersize=9, zorder=2)
        if n == 1 or kl - placed < 0.035 * right:  # a label that would lie on the one before is left out
            continue
        above = max(value, summary.limits[measure].at(kl).nan_to_num(-math.inf).item())
        axes.annotate(str(n), (kl, above), (-1, 5), textcoords="offset points", ha="right", fontsize=8.5, color=_GREY)
        placed = kl


def _points(axes: Axes, method: Method, look: _Look, measure: str, x: Sequence[float]) -> None:
    """A method's points at ``x``, with the interval of the gain over the reference about each. How difficult the
    prompts happened to be moves all policies and both curves together, and would hide how these differ."""
    values = [point.estimates[measure].value for point in method.points]
    whiskers = _whiskers(method.points, f"{measure}_gain")
    axes.errorbar(x, values, yerr=whiskers, elinewidth=0.9, markersize=6.5, **look)


def _whiskers(points: Sequence[Policy], key: str) -> Tensor:
    """``[2, points]``, lengths below and above; none is negative, though a resampled interval may lie beside its
    value."""
    estimates = [point.estimates[key] for point in points]
    lengths = [(one.value - one.low, one.high - one.value) for one in estimates]
    return torch.tensor(lengths, dtype=torch.float64).clamp(min=0).T


def _legend_below(figure: Figure, axes: Axes, summary: Summary) -> None:
    handles = [Line2D([], [], label=method.label, **look) for method, look in _looks(summary)]
    handles += axes.get_legend_handles_labels()[0]
    for handle in handles:
        handle.set_label(textwrap.fill(handle.get_label(), 64))
    for columns in (3, 2, 1):  # as many as there is room for
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


# Training curves.


def training(summary: Summary, key: str) -> Figure:
    """A curve of the training runs against the tokens they generated: one panel a method, with common axes.

    Seeds are thin lines as logged; the thick line is the mean of the seeds, smoothed over a tenth of the run.
    """
    count = len(summary.methods)
    columns = 1 if count == 1 else 2
    rows = math.ceil(count / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 0.4 + 2.7 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, (method, look) in zip(panels, _looks(summary), strict=False):
            for place, point in enumerate(method.points):
                _runs(axes, point, key, look, place)
            axes.set_title(method.label, loc="left", fontweight="bold")
            _legend(axes, "not logged", handlelength=2.6, fontsize=8, loc="upper left", borderaxespad=0.2)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelbottom=True, labelleft=True)
        for axes in panels[count:]:
            axes.set_axis_off()
        low, high = panels[0].get_ylim()
        lines = max(len(method.points) for method in summary.methods)
        panels[0].set_ylim(low, high + (high - low) * 0.09 * lines)  # room for the legends
        figure.supxlabel("generated tokens, thousands", fontsize=10)
        figure.supylabel(NAMES[key], fontsize=10)
        return figure


def _legend(axes: Axes, instead: str, **more: Any) -> None:
    """A legend, or words in the middle of a panel without curves."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**more)
    else:
        axes.text(0.5, 0.5, instead, transform=axes.transAxes, ha="center", color=_GREY)


def _smooth(axes: Axes, x: Tensor, values: Tensor, marker: str, **more: Any) -> None:
    """The thick line of a curve; a marker where it has a single value."""
    axes.plot(x, smoothed(values), linewidth=2, marker=marker if len(x) == 1 else None, **more)


def _runs(axes: Axes, point: Policy, key: str, look: _Look, place: int) -> None:
    """The strengths of one method share its colour, and differ in line and opacity."""
    line, opacity = _STRENGTH_LINES[place % len(_STRENGTH_LINES)], _OPACITIES[min(place, len(_OPACITIES) - 1)]
    runs = [run for run in (_curve(cell, key) for cell in point.cells) if len(run[0]) > 0]
    for tokens, values in runs:
        axes.plot(tokens, values, color=look["color"], linewidth=0.6, alpha=0.35 * opacity)
    if runs:
        label = point.strength or "mean of the seeds"
        _smooth(axes, *mean_curve(runs), **look | {"linestyle": line, "alpha": opacity, "label": label})


def _curve(cell: Result, key: str) -> tuple[Tensor, Tensor]:
    """(thousands of tokens, values) where both were logged, by tokens."""
    curve = cell.training.curve
    tokens = torch.tensor(curve.generated_tokens, dtype=torch.float64) / 1000
    values = torch.tensor(getattr(curve, key), dtype=torch.float64)
    logged = tokens.isfinite() & values.isfinite()
    order = tokens[logged].argsort()
    return tokens[logged][order], values[logged][order]


def mean_curve(runs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of several curves, (increasing tokens, values) each, over the tokens that all of them cover.

    Returns:
        (tokens, mean), on the tokens of the first run inside the common range; its first value if there is none.
    """
    low, high = max(run[0][0].item() for run in runs), min(run[0][-1].item() for run in runs)
    grid = runs[0][0][(runs[0][0] >= low) & (runs[0][0] <= high)]
    if not len(grid):
        return runs[0][0][:1], runs[0][1][:1]
    found = [interpolate(grid[None], tokens[None], values[None])[0] for tokens, values in runs]
    return grid, torch.stack(found).mean(dim=0)


def smoothed(values: Tensor) -> Tensor:
    """Moving average over a tenth of the entries; at the ends over those that there are."""
    reach = max(1, len(values) // 20)
    mean = torch.nn.functional.avg_pool1d
    return mean(values[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]


def run_curves(metrics: Sequence[dict[str, Any]], result: dict[str, Any]) -> Figure:
    """Reward, KL and expected log quantile over the steps of one run, each raw and smoothed.

    Args:
        metrics: by step, with any of ``reward/policy``, ``reward/anchor``, ``bond/kl_ref``, ``bond/kl_anchor`` and
            ``bond/log_quantile``.
        result: of :class:`bond_plugin.bench.two.Evaluation`; adds the held-out rewards of both models and of
            Best-of-N as level lines.
    """
    blue, orange, green = _COLOURS[:3]
    panels = (
        ("Reward of the training samples", "reward (mean of a step)", {
            "reward/anchor": ("anchor", orange), "reward/policy": ("policy", blue),
        }),
        ("KL of the policy", "KL (nats a response)", {
            "bond/kl_ref": ("to the initial policy", blue), "bond/kl_anchor": ("to the anchor", orange),
        }),
        ("Quantile", "expected log quantile (nats)", {"bond/log_quantile": ("policy among anchor samples", green)}),
    )  # fmt: skip
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        for axes, (title, unit, curves) in zip(figure.subplots(1, 3), panels, strict=True):
            for key, (label, colour) in curves.items():
                _run_curve(axes, metrics, key, label, colour)
            if key == "reward/policy":
                _levels(axes, result)
            axes.set(title=title, xlabel="step", ylabel=unit)
            _legend(axes, "not logged in this run", loc="best")
        figure.suptitle(f"{len(metrics)} steps: thin lines are single steps, thick lines their moving average")
        return figure


def _run_curve(axes: Axes, metrics: Sequence[dict[str, Any]], key: str, label: str, colour: str) -> None:
    logged = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), (int, float))]
    points = torch.tensor(logged, dtype=torch.float64).reshape(-1, 2)
    points = points[points[:, 1].isfinite()]
    if len(points):
        steps, values = points.unbind(-1)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        _smooth(axes, steps, values, "o", color=colour, label=label)


def _levels(axes: Axes, result: dict[str, Any]) -> None:
    """Held-out rewards as horizontal lines, named at the right edge of the panel."""
    levels = [
        ("before", result["reward_before"].value, _GREY, "-"),
        ("after", result["reward_after"].value, _COLOURS[0], "-"),
    ]
    levels += [(f"Best-of-{n}", level.value, _GREY, ":") for n, level in sorted(result["best_of"].items())]
    for _, height, colour, style in levels:
        axes.axhline(height, color=colour, linestyle=style, linewidth=1.2)
    # Names of levels that lie close together are moved apart, a line's height each.
    low, high = axes.get_ylim()
    step, floor = (high - low) * 0.05, low
    place = {"xycoords": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "annotation_clip": False}
    for name, height, colour, _ in sorted(levels, key=lambda level: level[1]):
        floor = max(floor + step, height)
        axes.annotate(f"{name} {height:.2f}", (1.01, floor), color=colour, **place)
    axes.annotate("held-out:", (1.01, 1.03), xycoords="axes fraction", fontsize=8, color=_GREY)


# Cost.


def cost(summary: Summary) -> Figure:
    """Mean reward against the tokens generated for the training and its reward cache, and against its wall time."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 6.6), layout="constrained")
        costs = (
            ("tokens", 1e3, "tokens generated for a run, thousands"),
            ("seconds", 60, "wall time of a run, minutes"),
        )
        for axes, (key, scale, name) in zip(figure.subplots(2, 1, sharey=True), costs, strict=True):
            for method, look in _looks(summary):
                paid = [point.training(key) / scale for point in method.points]
                _points(axes, method, look | {"linestyle": "none"}, "reward", paid)
            axes.axhline(summary.limits["reward"].base, color=_GREY, linewidth=1.2, linestyle=":", label="reference")
            axes.set(xlabel=name, ylabel=NAMES["reward"])
            axes.set_xlim(left=0)
        _legend_below(figure, axes, summary)
        return figure
