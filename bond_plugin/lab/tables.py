"""What a reader sees of a report: plain text, at most 118 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bond_plugin.lab.programme import Report

_POINT = ("kl_to_bon", "kl_from_bon", "jeffreys", "reward", "quantile", "kl_ref")
_ROUNDS = {
    "": "<16", "KL(pi||ref)": ">13.3f", "exact": ">8.3f", "reward": ">9.3f", "exact ": ">8.3f",
    "worth Best-of": ">15.2f", "off the curve": ">+15.3f",
}  # fmt: skip
_ESTIMATORS = {
    "": "<32",
    "gradient of": "<23",
    "bias": ">8",
    "seen from": ">11.1%",
    "noise": ">8.0%",
    "cosine": ">8.3f",
}


def text(report: Report) -> str:
    """All tables, ending without a newline."""
    parts = []
    for table in report.tables.values():
        aim = "BoN" if table.n else "aim"
        columns = {
            "": "<30", f"KL(pi||{aim})": ">12.4f", f"KL({aim}||pi)": ">12.4f", "Jeffreys": ">9.4f",
            "reward": ">8.3f", "quantile": ">9.3f", "KL(pi||ref)": ">12.3f", " ": "",
        }  # fmt: skip
        rows = ((row.name, *(getattr(row.point, key) for key in _POINT), f"  {row.note}") for row in table.rows)
        parts.append(_laid_out(f"{table.title} ({table.policy} policy, {table.rewards} rewards)", columns, rows))
    if report.rounds:
        title = "Iterative BOND: the end of each period beside the exact Best-of-n^m of the reference"
        rows = (
            (f"Best-of-{r.n}", r.policy.kl_ref, r.exact.kl_ref, r.policy.reward, r.exact.reward, r.worth, r.gap)
            for r in report.rounds
        )
        parts.append(_laid_out(title, _ROUNDS, rows))
    title = "Estimators: the mean of 200 batches' gradients beside the exact gradient (% of its norm)"
    errors = ((e.name, e.against, e.error) for e in report.estimators)
    rows = (
        (name, against, f"{e.bias:.1%}" if e.biased else "none", e.resolution, e.noise, e.cosine)
        for name, against, e in errors
    )
    parts.append(_laid_out(title, _ESTIMATORS, rows))
    parts.append(
        "bias: 'none' if 200 batches show none; 'seen from': the error of their mean; noise: one batch's deviation"
    )
    if report.cached:  # vBoN's distance from Best-of-N for each size of the cache
        title = (
            "Sensitivity to M: KL(pi||BoN) of vBoN's optimum with M cached rewards, "
            "mean and middle 90 % of 400 caches"
        )
        by_size: dict[int, list[str]] = {}
        for c in report.cached:
            by_size.setdefault(c.samples, []).append(f"{c.kl_to_bon:.4f}  [{c.low:.4f}, {c.high:.4f}]")
        columns = {"M": ">6"} | {f"vbon {c.bound}": ">30" for c in report.cached}
        parts.append(_laid_out(title, columns, ((samples, *cells) for samples, cells in by_size.items())))
    return "\n\n".join(parts)


def _laid_out(title: str, columns: dict[str, str], rows: Iterable[tuple[object, ...]]) -> str:
    """A table; ``columns`` gives for each heading how a cell stands under it, such as ``>8.3f``."""
    shown = ["".join(f"{cell:{how}}" for cell, how in zip(row, columns.values(), strict=True)) for row in rows]
    widths = [re.sub(r"\+|\..*", "", how) for how in columns.values()]
    heading = "".join(f"{name.strip():{width}}" for name, width in zip(columns, widths, strict=True))
    return "\n".join(line.rstrip() for line in (title, "", heading, *shown))
