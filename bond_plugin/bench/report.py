"""The report of ``bond bench``: ``report.md`` with its pictures, and ``report.html``, which needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bond_plugin.bench import sections
from bond_plugin.bench.document import Block, Heading, Log, Paragraph, Picture, to_html, to_markdown
from bond_plugin.bench.resampling import RESAMPLES, Estimate
from bond_plugin.bench.results import read_results
from bond_plugin.bench.summary import BEST_OF_N, Policy, Summary, strength_text
from bond_plugin.files import write_whole

PICTURES = "figures"


def write_report(out_dir: Path, resamples: int = RESAMPLES) -> list[Path]:
    """Write the report about a results folder into that folder.

    Args:
        out_dir: holds ``reference.json`` and ``results.jsonl``; an earlier report in it is replaced.
        resamples: of the bootstrap behind the intervals.

    Returns:
        The files written: ``report.html``, ``report.md`` and the pictures of the latter, ``figures/*.png``.

    Raises:
        bond_plugin.bench.results.ResultsError: a file cannot be used.
    """
    out_dir = Path(out_dir)
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
        for section in sections.OF_POLICIES:
            blocks += section(summary)
    return blocks + sections.settings(summary)


# What it comes to.


def outcome(summary: Summary) -> str:
    """One sentence: whose front is highest, above which others that is sure, and what one sample is worth."""
    if not summary.methods:
        return f"No run finished: all {len(summary.results.cells)} failed."
    leader = max(summary.methods, key=lambda method: _defined(method.area["reward"].value))
    best = leader.best
    gain = best.estimates["reward_gain"]
    strength = strength_text(best.strength)
    policy = f"its best policy ({strength})" if strength else "its policy"
    worth = f"one sample of {policy} {_worth(summary, best)}, at a KL of {best.kl:.2f} nats"
    if gain.low <= 0:
        worth = f"its reward cannot be told from the reference's (gain {sections.with_interval(gain)})"
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


def _defined(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _worth(summary: Summary, point: Policy) -> str:
    n = round(point.matches.value)
    if n == 0:
        return "has less reward than one sample of the reference"
    last = summary.curve.ns[-1]
    level = f"at least Best-of-{n}" if n == last else f"Best-of-{n}" if n > 1 else "one sample, not Best-of-2,"
    return f"has the reward of {level} of the reference [{sections.n_range(summary, point)}]"


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
    failed = summary.results.failed
    if not failed:
        return []
    count = f"{len(failed)} of {len(summary.results.cells)} runs failed and {'is' if len(failed) == 1 else 'are'}"
    return [
        Heading("Failed runs"),
        Paragraph(f"{count} in no number below."),
        *(Log(cell.cell, (cell.error or "").strip()) for cell in failed),
    ]
