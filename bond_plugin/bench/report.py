"""The report of ``bond bench``: ``report.md`` with its pictures, and ``report.html``, which needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bond_plugin.bench import figures
from bond_plugin.bench.document import (
    Block,
    Entry,
    Heading,
    Log,
    Paragraph,
    Picture,
    Table,
    Texts,
    to_html,
    to_markdown,
)
from bond_plugin.bench.resampling import RESAMPLES, Estimate
from bond_plugin.bench.results import read_results
from bond_plugin.bench.summary import BEST_OF_N, MEASURES, Policy, Summary
from bond_plugin.files import write_whole

PICTURES = "figures"
_NONE = "–"
_BEYOND = "†"
_EXAMPLES = 4  # prompts whose samples are shown
_NAMES = {"reward": "reward", "win_rate": "win rate"}
_DIGITS = {"entropy": 2, "length": 1}  # of estimates with others than three


def write_report(out_dir: Path, resamples: int = RESAMPLES) -> list[Path]:
    """Write the report about a results folder into that folder; an earlier one in it is replaced.

    Returns:
        The files written: ``report.html``, ``report.md`` and the pictures of the latter, ``figures/*.png``.

    Raises:
        bond_plugin.bench.results.ResultsError: ``reference.json`` or ``results.jsonl`` cannot be used.
    """
    summary = Summary(read_results(out_dir), resamples)
    title, blocks = summary.results.reference.title, contents(summary)
    files = {f"{PICTURES}/{block.name}.png": block.png for block in blocks if isinstance(block, Picture)}
    files["report.md"] = to_markdown(title, blocks, PICTURES).encode()
    files["report.html"] = to_html(title, blocks).encode()
    (out_dir / PICTURES).mkdir(exist_ok=True)
    for name, content in files.items():
        write_whole(out_dir / name, content)
    return [out_dir / name for name in reversed(files)]


def contents(summary: Summary) -> list[Block]:
    """The report's blocks, in reading order. Without a finished run: what failed, and the settings."""
    blocks: list[Block] = [Paragraph(outcome(summary), important=True), Paragraph(conditions(summary))]
    blocks += failures(summary)
    if summary.points:
        for section in (policies, fronts, worth, training, cost, samples):
            blocks += section(summary)
    return blocks + settings(summary)


# Numbers and their words.


def _entry(estimate: Estimate | None, digits: int = 3, scale: float = 1.0) -> Entry:
    if estimate is None or not math.isfinite(estimate.value):
        return _NONE
    if estimate.high - estimate.low <= 1e-9 * (1 + abs(estimate.value)):  # exact, or nothing to resample
        return f"{scale * estimate.value:.{digits}f}"
    value, low, high = (f"{scale * part:.{digits}f}" for part in (estimate.value, estimate.low, estimate.high))
    return value, f"[{low}, {high}]"


def _percentages(shares: dict[str, float]) -> list[str]:
    return [f"{100 * shares[measure]:.0f}" for measure in MEASURES]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else _NONE


def _value(summary: Summary, estimates: dict[str, Estimate], key: str) -> Entry:
    """An estimate by its name; a share of the limit in percent, marked where the limit is not supported."""
    if not key.endswith("share"):
        return _entry(estimates.get(key), _DIGITS.get(key, 3))
    entry = _entry(estimates.get(key), 1, 100)
    measure = "win_rate" if key.startswith("win_rate") else "reward"
    if isinstance(entry, str) or summary.limits[measure].supported_at(estimates["kl"].value):
        return entry
    return f"{entry[0]} {_BEYOND}", entry[1]


def _table(
    summary: Summary, name: str, policies: Sequence[tuple[str, dict[str, Estimate]]], columns: dict[str, str]
) -> Table:
    """A row for each of ``policies``, names and estimates; ``columns`` are titles, and names of estimates."""
    rows = [
        [policy, *(_value(summary, estimates, key) for key in columns.values())] for policy, estimates in policies
    ]
    return Table(name, ["policy", *columns], rows)


def n_range(summary: Summary, point: Policy) -> str:
    """The interval of the N that a point matches, in words."""
    low, high, last = round(point.matches.low), round(point.matches.high), summary.curve.ns[-1]
    return f"{low if low == high else f'{low} to {high}'}{' or more' if high == last else ''}"


# What it comes to.


def outcome(summary: Summary) -> str:
    """One sentence: whose front is highest, above which others that is sure, and what one sample is worth."""
    if not summary.methods:
        return f"No run finished: all {len(summary.results.cells)} failed."
    defined = [method for method in summary.methods if math.isfinite(method.area["reward"].value)]
    leader = max(defined or summary.methods, key=lambda method: method.area["reward"].value)
    best = leader.best
    policy = f"its best policy ({best.strength})" if best.strength else "its policy"
    worth = f"one sample of {policy} {_worth(summary, best)}, at a KL of {best.kl:.2f} nats"
    if best.estimates["reward_gain"].low <= 0:
        gain = _entry(best.estimates["reward_gain"])
        said = gain if isinstance(gain, str) else " ".join(gain)
        worth = f"its reward cannot be told from the reference's (gain {said})"
    if len(summary.methods) == 1:
        return f"{leader.label}: {worth}."
    gaps = {}  # how far the leader lies above each other method
    for found in summary.comparisons["reward"]:
        if found.first == leader.label and found.second != BEST_OF_N:
            gaps[found.second] = found.gap
        elif found.second == leader.label:
            gaps[found.first] = Estimate(-found.gap.value, -found.gap.high, -found.gap.low)
    said = {
        "above {} at equal KL beyond the 95 % interval": [label for label, gap in gaps.items() if gap.low > 0],
        "not told apart from {}": [label for label, gap in gaps.items() if gap.low <= 0],
        "with no KL in common with {}": [label for label, gap in gaps.items() if math.isnan(gap.low)],
    }
    parts = [text.format(_listed(labels)) for text, labels in said.items() if labels]
    return f"{leader.label} has the highest reward front, {_listed(parts)}; {worth}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _worth(summary: Summary, point: Policy) -> str:
    n = round(point.matches.value)
    if n == 0:
        return "has less reward than one sample of the reference"
    last = summary.curve.ns[-1]
    level = f"at least Best-of-{n}" if n == last else f"Best-of-{n}" if n > 1 else "one sample, not Best-of-2,"
    return f"has the reward of {level} of the reference [{n_range(summary, point)}]"


def conditions(summary: Summary) -> str:
    """What the numbers rest on."""
    reference = summary.results.reference
    seeds = sorted({len(point.cells) for point in summary.points})
    text = (
        f"{len(reference.prompts)} evaluation prompts, the same for all; {reference.rewards.shape[1]} samples of the "
        f"reference for each. In brackets: 95 % intervals, from {summary.resamples:,} bootstrap resamples"
    )
    if not seeds:
        return text + "."
    if seeds == [1]:
        return text + (
            " of the prompts. There is one seed for each policy: the intervals cover the choice of prompts only. "
            "How far another run of the same settings would differ is not in them."
        )
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text += f" of seeds and of prompts together; {number} seeds for each policy, pooled."
    if seeds[0] == 1:
        text += " Where there is one seed, the interval covers the choice of prompts only."
    if seeds[-1] < 5:
        text += " So few seeds say little about the spread between runs; intervals tend to be too narrow."
    return text


def failures(summary: Summary) -> list[Block]:
    failed = [cell for cell in summary.results.cells if cell.error is not None]
    if not failed:
        return []
    count = f"{len(failed)} of {len(summary.results.cells)} runs failed and {'is' if len(failed) == 1 else 'are'}"
    return [
        Heading("Failed runs"),
        Paragraph(f"{count} in no number below."),
        *(Log(cell.cell, cell.error.strip()) for cell in failed),
    ]


# Sections.


def policies(summary: Summary) -> list[Block]:
    """A row for each method and strength, in tables narrow enough to read."""
    trained = [(point.name, point.estimates) for point in summary.points]
    beside = trained + [(f"Best-of-{n} of the reference", estimates) for n, estimates in summary.best_of.items()]
    trained = [("reference", summary.reference.estimates), *trained]
    kl = {"KL(π‖π_ref), nats": "kl"}
    rewards = {"mean reward": "reward", "gain over the reference": "reward_gain", "win rate": "win_rate"}
    shares = {}
    for measure, name in _NAMES.items():
        shares[f"{name}: % of the limit"] = f"{measure}_share"
        shares[f"Best-of-N there, {name}"] = f"{measure}_bon_share"
        shares[f"{name} above Best-of-N"] = f"{measure}_above_bon"
    levels = summary.results.reference.bon_levels
    distances = {f"KL(π‖Best-of-{n}), nats": f"backward_kl_{n}" for n in levels}
    distances |= {f"KL(Best-of-{n}‖π), nats": f"forward_kl_{n}" for n in levels}
    quantiles = {"expected quantile": "quantile", "expected log quantile": "log_quantile"}
    texts = {"entropy, nats": "entropy", "distinct-1": "distinct_1", "distinct-2": "distinct_2"}
    texts["length, tokens"] = "length"
    passes = sorted({n for cell in summary.results.done if cell.evaluation for n in cell.evaluation.pass_at})
    right = {f"pass@{n}": f"pass_at_{n}" for n in passes}
    return [
        Heading("The trained policies, and Best-of-N"),
        _table(summary, "Reward and win rate against the reference", beside, rewards | kl),
        Paragraph(
            "Best-of-N is computed from the samples of the reference, its KL from their ties (log N − (N−1)/N "
            "without ties). The gain is prompt by prompt: how difficult the prompts are is not in its interval."
        ),
        _table(summary, "Against the limit at the policy's own KL", beside, kl | shares),
        Paragraph(
            "The limit is the highest value that any policy can have at this KL, that of the reference tilted by the "
            "reward, estimated from the reference's samples and corrected for its bias. Shares are of the possible "
            "gain over the reference; beside each, what Best-of-N has at the same KL, and how far the policy is "
            f"above it. {_BEYOND}: more KL than these samples can support the limit for (a bias above 2 % before "
            f"correction). {_NONE}: not defined, or beyond Best-of-{summary.curve.ns[-1]}."
        ),
        _table(summary, "Distance to Best-of-N", trained, distances),
        _table(summary, "Quantiles among the reference's samples", trained, quantiles),
        _table(summary, "Responses", trained, texts),
        *([_table(summary, "Problems solved within k samples", trained, right)] if right else []),
    ]


def fronts(summary: Summary) -> list[Block]:
    """Both fronts, who is on them, and how the methods compare at equal KL."""
    whiskers = (
        "Points are the seeds of a strength pooled, joined in order of KL. Whiskers: 95 % intervals, upwards of the "
        "gain over the reference. Numbers along the limit: N of Best-of-N."
    )
    pictures = []
    for measure, name in (("reward", "Mean reward"), ("win_rate", "Win rate")):
        alt = f"{name} against KL. " + "; ".join(
            f"{point.name}: {point.estimates[measure].value:.3f} at {point.kl:.2f} nats" for point in summary.points
        )
        caption = f"{name} against the KL to the reference. {whiskers}"
        pictures.append(_picture(f"front_{measure}", alt, caption, figures.front(summary, measure)))
    header = [
        "method",
        *(f"{what}, {name}, %" for what in ("area", "share of the front") for name in _NAMES.values()),
    ]
    rows = []
    for method in summary.methods:
        areas = [_entry(method.area[measure], 1, 100) for measure in MEASURES]
        rows.append([method.label, *areas, *_percentages(method.front_share)])
    on_front = [[point.name, *_percentages(point.on_front)] for point in summary.points]
    comparisons = []
    for first, second in zip(*(summary.comparisons[measure] for measure in MEASURES), strict=True):
        span = f"{first.low:.2f} to {first.high:.2f}" if first.low < first.high else _number(first.high, 2)
        comparisons.append([f"{first.first} above {first.second}", span, _entry(first.gap), _entry(second.gap)])
    area = summary.area_up_to
    return [
        Heading("Fronts: what is gained at which KL"),
        *pictures,
        _table(
            summary,
            "Where the objectives lead",
            [(f"Best-of-{n}", estimates) for n, estimates in summary.best_of.items() if n > 1],
            {
                "KL, nats": "kl",
                "reward: % of the limit": "reward_share",
                "win rate: % of the limit": "win_rate_share",
                "RL with a KL penalty, at this KL: win rate, % of the limit": "win_rate_tilted_share",
            },
        ),
        Paragraph(
            "Best-of-N is the optimum of BOND and vBoN. The optimum of RL with a KL penalty (REINFORCE, RLOO, PPO) "
            "is the reference tilted by the reward, which in mean reward is the limit itself: with samples enough, "
            "nothing lies above it there, and which of the two has the higher win rate depends on how rewards are "
            "distributed. What a run has less than its own optimum is a matter of samples and of optimisation."
        ),
        Table("Methods", header, rows),
        Paragraph(
            "Area: the part of all possible gains that a method's front has, for KL from 0 to "
            f"{area['reward']:.2f} nats (reward) and {area['win_rate']:.2f} nats (win rate). A method's front is the "
            "least concave curve above its points and the reference, which a random choice between two policies "
            "attains; it stays level beyond its last point. So the area of a method with few points is too small, "
            "most of all without one near the reference, where what is possible rises steeply. Share of the front: "
            "how many of the points on the Pareto front of all methods are this method's, on average over the "
            "resamples."
        ),
        Table(
            "How often a policy is on the Pareto front",
            ["policy", "reward, % of resamples", "win rate, % of resamples"],
            on_front,
        ),
        Table("At equal KL", ["comparison", "KL, nats", "reward", "win rate"], comparisons, text_columns=2),
        Paragraph(
            "How far one front lies above the other, on average over the KLs between the points of both (at one KL, "
            "if one of them has a single point), resampled with the same prompts for both. An interval that contains "
            f"0 tells no difference. {_NONE}: the points of the two have no KL in common; more strengths are needed."
        ),
    ]


def worth(summary: Summary) -> list[Block]:
    """The N of Best-of-N that one sample of each method's best point stands for."""
    rows = []
    for method in summary.methods:
        best, last = method.best, summary.curve.ns[-1]
        n = round(best.matches.value)
        saved = f"{n}{' or more' if n == last else ''} → 1" if n > 1 else "nothing"
        found: Entry = (str(n) if n else "none", f"[{n_range(summary, best)}]")
        rows.append([best.name, _entry(best.estimates["reward"]), f"{best.kl:.2f}", found, saved])
    return [
        Heading("What one sample is worth"),
        Table(
            "The point of each method with the highest reward",
            ["policy", "mean reward", "KL, nats", "N", "samples a request"],
            rows,
        ),
        Paragraph(
            "N: the largest for which Best-of-N of the reference has no more mean reward than one sample of the "
            "policy. Its interval ends at the largest N that is not above the policy beyond the 95 % interval. "
            "Best-of-N would draw and score N samples for each request; the policy draws one and scores none."
        ),
    ]


def training(summary: Summary) -> list[Block]:
    """The curves of all runs."""
    names = {"reward": "Reward", "kl": "KL to the reference", "log_quantile": "Expected log quantile"}
    moving = ", among the samples that the run compares with: those of an anchor that moves, if it has one"
    note = "Thin: single seeds as logged. Thick: mean of the seeds, smoothed over a tenth of the run."
    pictures = [
        _picture(
            f"training_{key}",
            f"{name} over the training, one panel for each method",
            f"{name} in training{moving if key == 'log_quantile' else ''}. {note}",
            figures.training(summary, key),
        )
        for key, name in names.items()
    ]
    return [Heading("Training"), *pictures]


def cost(summary: Summary) -> list[Block]:
    """What the runs cost, and what they reached for it."""
    cached = any(point.training("cached_tokens") for point in summary.points)
    counts = {"steps": "steps", "generated_tokens": "generated tokens"}
    if cached:
        counts["cached_tokens"] = "tokens of its reward cache"
    counts["seconds"] = "wall time, s"
    rows = []
    for point in summary.points:
        memory = _number(point.training("peak_memory_gib"), 2)
        rows.append([point.name, str(len(point.cells)), *(_number(point.training(key)) for key in counts), memory])
    header = ["policy", "seeds", *counts.values(), "peak memory, GiB"]
    caption = "Mean reward of each trained policy against what its training cost; seeds pooled."
    if cached:
        caption += (
            " The tokens of a reward cache are counted for every run that read it, though one cache serves them all."
        )
    return [
        Heading("Cost"),
        Table("Cost of a run, mean over its seeds", header, rows),
        _picture("cost", caption, caption, figures.cost(summary)),
    ]


def _picture(name: str, alt: str, caption: str, figure: Figure) -> Picture:
    return Picture(name, alt, caption, figures.svg(figure), figures.png(figure))


def samples(summary: Summary) -> list[Block]:
    """Responses of the reference and of each method, at KLs as equal as the points allow."""
    nearest = [min(m.points, key=lambda point: abs(point.kl - summary.common_kl)) for m in summary.methods]
    shown = [("reference", summary.reference)] + [(f"{p.name}, {p.kl:.2f} nats", p) for p in nearest]
    blocks: list[Block] = [
        Heading("Samples"),
        Paragraph(
            "One sample for each prompt, of the reference and of each method's point nearest to "
            f"{summary.common_kl:.2f} nats, the largest KL that all methods reach. Not chosen by hand."
        ),
    ]
    for example in summary.reference.examples[:_EXAMPLES]:
        items = []
        for name, point in shown:
            same = [other for other in point.examples if other.prompt == example.prompt]
            items += [(f"{name}: reward {other.reward:.3f}", other.response or "(empty)") for other in same[:1]]
        blocks.append(Texts(example.prompt, items))
    return blocks


def settings(summary: Summary) -> list[Block]:
    """What all runs have in common, what each has of its own, and its numbers alone."""
    reference = summary.results.reference
    names = {"seconds": "sampling the reference, seconds", "generated_tokens": "sampling the reference, tokens"}
    keys = ("command", "model", "reward", "max_new_tokens", "temperature", "quantile_samples")
    given = {key: getattr(reference, key) for key in keys} | reference.model_extra
    rows = [[names.get(key, key), str(value)] for key, value in given.items() if key != "key"]
    rows.append(["bon_levels", ", ".join(map(str, reference.bon_levels))])
    runs = []
    for cell in summary.results.cells:
        flags = ", ".join(f"{key} {value}" for key, value in cell.flags.items()) or _NONE
        measured = [_NONE] * 3
        if cell.evaluation is not None:
            measured = [
                _number(getattr(cell.evaluation, key).mean().item(), 3) for key in ("reward", "win_rate", "kl")
            ]
        runs.append([cell.cell, flags, *measured])
    return [
        Heading("Settings"),
        Table("Common to all runs", ["setting", "value"], rows, text_columns=2),
        Table("Every run", ["run", "flags", "mean reward", "win rate", "KL, nats"], runs, text_columns=2),
    ]
