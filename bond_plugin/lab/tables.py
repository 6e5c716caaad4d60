"""What a reader sees of a report: plain text, at most 118 columns."""

from __future__ import annotations

from collections.abc import Iterable

from bond_plugin.lab.programme import Cached, Estimator, Report, Round, Table


def text(report: Report) -> str:
    """All tables, ending without a newline."""
    parts = [_policies(table) for table in report.tables.values()]
    if report.rounds:
        parts.append(_rounds(report.rounds))
    parts.append(_estimators(report.estimators))
    if report.cached:
        parts.append(_sensitivity(report.cached))
    return "\n\n".join(parts)


def _laid_out(title: str, columns: dict[str, str], rows: Iterable[tuple[object, ...]]) -> str:
    """A table; ``columns`` gives for each heading how a cell stands under it, such as ``>8``."""
    shown = ["".join(f"{cell:{width}}" for cell, width in zip(row, columns.values(), strict=True)) for row in rows]
    heading = "".join(f"{name.strip():{width}}" for name, width in columns.items())
    return "\n".join(line.rstrip() for line in (title, "", heading, *shown))


def _policies(table: Table) -> str:
    aim = "BoN" if table.n else "aim"
    columns = {
        "": "<30", f"KL(pi||{aim})": ">12", f"KL({aim}||pi)": ">12", "Jeffreys": ">9", "reward": ">8",
        "quantile": ">9", "KL(pi||ref)": ">12", " ": "",
    }  # fmt: skip
    rows = (
        (
            row.name, f"{p.kl_to_bon:.4f}", f"{p.kl_from_bon:.4f}", f"{p.jeffreys:.4f}", f"{p.reward:.3f}",
            f"{p.quantile:.3f}", f"{p.kl_ref:.3f}", f"  {row.note}",
        )
        for row in table.rows for p in (row.point,)
    )  # fmt: skip
    return _laid_out(f"{table.title} ({table.policy} policy, {table.rewards} rewards)", columns, rows)


def _rounds(rounds: list[Round]) -> str:
    columns = {
        "": "<16", "KL(pi||ref)": ">13", "exact": ">8", "reward": ">9", "exact ": ">8", "worth Best-of": ">15",
        "off the curve": ">15",
    }  # fmt: skip
    rows = (
        (
            f"Best-of-{r.n}", f"{r.policy.kl_ref:.3f}", f"{r.exact.kl_ref:.3f}", f"{r.policy.reward:.3f}",
            f"{r.exact.reward:.3f}", f"{r.worth:.2f}", f"{r.gap:+.3f}",
        )
        for r in rounds
    )  # fmt: skip
    title = "Iterative BOND: the end of each period beside the exact Best-of-n^m of the reference"
    return _laid_out(title, columns, rows)


def _estimators(estimators: list[Estimator]) -> str:
    columns = {"": "<32", "gradient of": "<23", "bias": ">8", "seen from": ">11", "noise": ">8", "cosine": ">8"}
    rows = (
        (
            e.name, e.against, f"{e.error.bias:.1%}" if e.error.biased else "none", f"{e.error.resolution:.1%}",
            f"{e.error.noise:.0%}", f"{e.error.cosine:.3f}",
        )
        for e in estimators
    )  # fmt: skip
    title = "Estimators: the mean of 200 batches' gradients beside the exact gradient (% of its norm)"
    note = "bias: 'none' if 200 batches show none; 'seen from': the error of their mean; noise: one batch's deviation"
    return f"{_laid_out(title, columns, rows)}\n\n{note}"


def _sensitivity(cached: list[Cached]) -> str:
    """vBoN's distance from Best-of-N for each size of the cache."""
    columns = {"M": ">6"} | {f"vbon {c.bound}": ">30" for c in cached}
    by_size: dict[int, list[str]] = {}
    for c in cached:
        by_size.setdefault(c.samples, []).append(f"{c.kl_to_bon:.4f}  [{c.low:.4f}, {c.high:.4f}]")
    rows = ((samples, *cells) for samples, cells in by_size.items())
    title = (
        "Sensitivity to M: KL(pi||BoN) of vBoN's optimum with M cached rewards, mean and middle 90 % of 400 caches"
    )
    return _laid_out(title, columns, rows)
