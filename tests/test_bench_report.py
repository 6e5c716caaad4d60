"""The report of ``bond bench``, on a toy whose right numbers are known.

Rewards of the reference are Gaussian, prompt by prompt N(mu_p, 1). A policy that is the reference tilted by the
reward is N(mu_p + d, 1): KL d^2 / 2, and nothing has more reward at that KL. A method of efficiency e has the same
reward at the KL d^2 / 2 / e^2, and so the share e of the limit.
"""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from bond_plugin.bench import figures
from bond_plugin.bench.figures import mean_curve, smoothed
from bond_plugin.bench.report import conditions, outcome, write_report
from bond_plugin.bench.resampling import Resampling, envelope
from bond_plugin.bench.results import ResultsError, read_results
from bond_plugin.bench.summary import MEASURES, Summary
from bond_plugin.bestofn.estimates import expected_max
from bond_plugin.bestofn.limits import Front

RESAMPLES = 200
PROMPTS, SAMPLES, LEVELS = 48, 128, (4, 8, 16)
NASTY = '<script>alert("x")</script> & | `code` <img src=http://example.org/a.png>'

_Z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
_DENSITY = torch.exp(-(_Z**2) / 2) / math.sqrt(2 * math.pi) * (_Z[1] - _Z[0])


def expected_log_quantile(d: float) -> float:
    """E[log Phi(z + d)]."""
    return (_DENSITY * torch.special.log_ndtr(_Z + d)).sum().item()


def expected_best(n: int) -> float:
    """The mean of the largest of n standard normal numbers."""
    return (_DENSITY * _Z * n * torch.special.ndtr(_Z) ** (n - 1)).sum().item()


def bon_kl(n: int) -> float:
    return math.log(n) - (n - 1) / n


def evaluation(mu: Tensor, d: float, kl: float, noise: Callable[[], Tensor]) -> dict[str, Any]:
    """A policy with rewards N(mu + d, 1) and this KL to the reference; ``noise`` gives what sampling adds."""
    log_quantile = expected_log_quantile(d)
    win_rate = torch.special.ndtr(torch.tensor(d / math.sqrt(2), dtype=torch.float64)).item()
    backward = {n: kl - math.log(n) - (n - 1) * log_quantile for n in LEVELS}
    forward = {n: bon_kl(n) - d * expected_best(n) + kl for n in LEVELS}

    def spread(value: float, scale: float) -> list[float]:
        return (value + scale * noise()).tolist()

    return {
        "reward": (mu + d + 0.25 * noise()).tolist(),
        "win_rate": spread(win_rate, 0.06),
        "kl": spread(kl, 0.1 * kl),
        "quantile": spread(win_rate, 0.06),
        "log_quantile": spread(log_quantile, 0.05),
        "entropy": spread(30 - 2 * kl, 0.5),
        "length": spread(15.0, 0.3),
        "backward_kl": {str(n): spread(value, 0.1) for n, value in backward.items()},
        "forward_kl": {str(n): spread(value, 0.1) for n, value in forward.items()},
        "distinct_1": 0.6 - 0.05 * kl,
        "distinct_2": 0.9 - 0.05 * kl,
    }


def curve(d: float, kl: float, tokens: int, noise: Callable[[], Tensor]) -> dict[str, list[float | None]]:
    """A run of 40 steps that comes near its end like an exponential. Two values were not logged."""
    at = torch.linspace(0, 1, 40, dtype=torch.float64)
    reached = 1 - torch.exp(-4 * at)
    lists = {
        "generated_tokens": (at * tokens).tolist(),
        "reward": (d * reached + 0.15 * noise()[:40]).tolist(),
        "kl": (kl * reached**2).tolist(),
        "log_quantile": (-1 + 0.4 * d * reached + 0.05 * noise()[:40]).tolist(),
    }
    lists["kl"][3] = None
    lists["log_quantile"][5] = None
    return lists


METHODS = (  # key, label, name of the strength, its values with the shifts d they lead to, efficiency, relative cost
    ("jbond", "J-BOND", "gamma", {0.0: 1.5, 0.5: 1.0, 2.0: 0.6}, 0.95, 1.0),
    ("vbon", "vBoN", "n", {4: 0.7, 16: 1.2}, 0.85, 1.6),
    ("rloo", "RLOO", "kl", {0.03: 1.8, 0.1: 0.9, 0.3: 0.5}, 0.7, 0.6),
)


def write_toy(
    folder: Path, methods: Sequence[tuple] = METHODS, seeds: int = 3, failed: str = "rloo", noisy: float = 1.0
) -> Path:
    """A results folder. The last cell of the method ``failed`` has failed; ``noisy`` scales the sampling errors."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return noisy * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)

    def examples(d: float) -> list[dict[str, Any]]:
        texts = [f"a sentence at d = {d:.1f}, {NASTY}", "the film was a long one, and " * 6, ""]
        return [
            {"prompt": f"Prompt {i}: the film", "response": text, "reward": d - i} for i, text in enumerate(texts)
        ]

    mu = torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
    rewards = mu.unsqueeze(-1) + torch.randn(PROMPTS, SAMPLES, generator=generator, dtype=torch.float64)
    reference = {
        "title": "Three methods on a Gaussian toy",
        "command": "bond bench toy.yaml --output-dir toy",
        "model": "toy",
        "reward": "gaussian.py",
        "max_new_tokens": 16,
        "temperature": 1.0,
        "quantile_samples": 32,
        "bon_levels": list(LEVELS),
        "prompts": [f"Prompt {i}: the film" for i in range(PROMPTS)],
        "rewards": rewards.tolist(),
        "evaluation": evaluation(mu, 0.0, 0.0, noise),
        "examples": examples(0.0),
        "seconds": 120.0,
        "generated_tokens": PROMPTS * SAMPLES * 15,
    }
    (folder / "reference.json").write_text(json.dumps(reference))
    lines = []
    for method, label, name, strengths, efficiency, cost in methods:
        for strength, d in strengths.items():
            for seed in range(1, seeds + 1):
                reached = d + 0.05 * noise()[0].item()
                kl = reached**2 / 2 / efficiency**2
                tokens = int(500_000 * cost)
                cell = {
                    "cell": f"{method} {name}={strength} seed={seed}",
                    "method": method,
                    "label": label,
                    "strength": {name: strength},
                    "seed": seed,
                    "status": "done",
                    "flags": {f"--bond.{name}": strength, "--train.seed": seed},
                    "training": {
                        "steps": 40,
                        "generated_tokens": tokens,
                        "seconds": 300.0 * cost + 10 * seed,
                        "peak_memory_gib": 3.5,
                        "curve": curve(reached, kl, tokens, noise),
                    },
                    "evaluation": evaluation(mu, reached, kl, noise),
                    "examples": examples(reached),
                }
                lines.append(cell)
    for cell in reversed(lines):
        if cell["method"] == failed:
            for key in ("training", "evaluation", "examples"):
                del cell[key]
            cell |= {"status": "failed", "error": "RuntimeError: out of memory <here>\nlast line"}
            break
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cells_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def write_cells(folder: Path, cells: Sequence[dict[str, Any]]) -> Path:
    (folder / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return folder


def edit_reference(folder: Path, **changes: Any) -> None:
    path = folder / "reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, three seeds, one failed run, and the report about them."""
    folder = write_toy(tmp_path_factory.mktemp("toy"))
    write_report(folder, RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def summary(toy: Path) -> Summary:
    return Summary(read_results(toy), RESAMPLES)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One method with one strength and one seed: two runs with the one that failed."""
    return write_toy(tmp_path / "small", METHODS[:1], seeds=1, failed="jbond")


def table(markdown: str, name: str) -> dict[str, dict[str, str]]:
    """A table of report.md: row name to column name to entry."""
    lines = markdown.split(f"**{name}**\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    rows = [[entry.strip() for entry in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    header = [name.replace("\\", "") for name in rows[0]]
    assert all(len(row) == len(header) for row in rows)
    return {row[0].replace("\\", ""): dict(zip(header, row, strict=True)) for row in rows[2:]}


# The numbers.


def test_rows_are_means_over_seeds_and_prompts(toy: Path) -> None:
    markdown = (toy / "report.md").read_text()
    rows = table(markdown, "Reward and win rate against the reference")
    shares = table(markdown, "Distance to Best-of-N")
    costs = table(markdown, "Cost of a run, mean over its seeds")
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells_of(toy):
        if cell["status"] == "done":
            (name, value), label = *cell["strength"].items(), cell["label"]
            groups.setdefault(f"{label} {name}={value:g}", []).append(cell)
    assert len(groups) == 8

    def mean(cells: list[dict[str, Any]], get: Callable[[dict[str, Any]], list[float]]) -> str:
        return f"{statistics.mean(statistics.mean(get(cell['evaluation'])) for cell in cells):.3f}"

    for name, cells in groups.items():
        for column, key in (("mean reward", "reward"), ("win rate", "win_rate"), ("KL(π‖π_ref), nats", "kl")):
            assert rows[name][column].split()[0] == mean(cells, lambda e, key=key: e[key])
        assert shares[name]["KL(π‖Best-of-8), nats"].split()[0] == mean(cells, lambda e: e["backward_kl"]["8"])
        assert shares[name]["KL(Best-of-4‖π), nats"].split()[0] == mean(cells, lambda e: e["forward_kl"]["4"])
        seconds = statistics.mean(cell["training"]["seconds"] for cell in cells)
        assert costs[name]["wall time, s"] == f"{seconds:.0f}"
        assert costs[name]["seeds"] == str(len(cells))


def test_tokens_of_a_reward_cache_are_part_of_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("svg", "png"):  # most of a report's time
        monkeypatch.setattr(figures, kind, lambda figure: b"<svg/>")
    folder = write_toy(tmp_path / "toy", failed="")
    write_report(folder, 20)
    assert "reward cache" not in (folder / "report.md").read_text()
    cells = cells_of(folder)
    wanted = cells[0]["method"]
    for cell in cells:
        cell["training"]["cached_tokens"] = 262_144 if cell["method"] == wanted else 0
    write_cells(folder, cells)
    write_report(folder, 20)
    rows = table((folder / "report.md").read_text(), "Cost of a run, mean over its seeds")
    found = {row["tokens of its reward cache"] for name, row in rows.items() if name.startswith(cells[0]["label"])}
    assert found == {"262,144"}
    assert {row["tokens of its reward cache"] for row in rows.values()} == {"262,144", "0"}
    point = next(one for one in Summary(read_results(folder), 20).points if one.method == wanted)
    assert point.training("tokens") == point.training("generated_tokens") + 262_144


def test_best_of_n_rows_are_exact(toy: Path, summary: Summary) -> None:
    rewards = torch.tensor(json.loads((toy / "reference.json").read_text())["rewards"], dtype=torch.float64)
    assert list(summary.best_of) == [1, 2, 4, 8, 16, 32, 64]
    for n, estimates in summary.best_of.items():
        assert estimates["reward"].value == pytest.approx(expected_max(rewards, n).mean().item())
        assert estimates["kl"].value == pytest.approx(bon_kl(n), abs=1e-9)
        assert estimates["win_rate"].value == pytest.approx(n / (n + 1), abs=1e-9)
    row = table((toy / "report.md").read_text(), "Reward and win rate against the reference")[
        "Best-of-4 of the reference"
    ]
    assert row["KL(π‖π_ref), nats"] == "0.636"  # exact: no interval


def test_shares_are_the_methods_efficiency(tmp_path: Path) -> None:
    """A method of efficiency e has the share e of the limit at its own KL; Best-of-16 has 92 % for Gaussians."""
    summary = Summary(read_results(write_toy(tmp_path / "toy", failed="", noisy=0.02)), 20)
    efficiencies = {method: efficiency for method, _, _, _, efficiency, _ in METHODS}
    for point in summary.points:
        if summary.limits["reward"].supported_at(point.kl):
            assert point.estimates["reward_share"].value == pytest.approx(efficiencies[point.method], abs=0.035)
    assert summary.best_of[16]["reward_share"].value == pytest.approx(0.92, abs=0.02)


def test_the_optimum_of_rl_is_short_of_the_limit_in_win_rate(toy: Path, summary: Summary) -> None:
    """Gaussian rewards tilted by themselves are moved by the root of 2 KL."""
    rows = table((toy / "report.md").read_text(), "Where the objectives lead")
    assert list(rows) == [f"Best-of-{n}" for n in (2, 4, 8, 16, 32, 64)]
    for n in (2, 4, 8):
        estimates = summary.best_of[n]
        kl = estimates["kl"].value
        won = torch.special.ndtr(torch.tensor(kl, dtype=torch.float64).sqrt()).item()
        share = (won - 0.5) / (summary.limits["win_rate"].at(kl).item() - 0.5)
        found = estimates["win_rate_tilted_share"]
        assert found.value == pytest.approx(share, abs=0.012) and found.low < found.value < found.high
        # Below the limit, and first above Best-of-N, then below.
        assert 0.9 < share < 1 and (share < estimates["win_rate_share"].value) == (n > 2)
        shown = rows[f"Best-of-{n}"]["RL with a KL penalty, at this KL: win rate, % of the limit"]
        assert shown.startswith(f"{100 * found.value:.1f}")
    label = figures.OPTIMUM
    assert label in {line.get_label() for line in figures.front(summary, "win_rate").axes[0].lines}
    assert label not in {line.get_label() for line in figures.front(summary, "reward").axes[0].lines}


def area_under(points: Sequence[tuple[float, float]], up_to: float, limit: Front) -> float:
    """The share of the gains that mixtures of any two of the points have, by the reference's own point too."""
    known = [(0.0, limit.base), *points]
    grid = torch.linspace(0, up_to, 2001, dtype=torch.float64)
    best = torch.full_like(grid, limit.base)
    for kl, value in known:
        best = torch.where(grid >= kl, best.clamp(min=value), best)
        for other_kl, other in known:
            if other_kl > kl:
                mixed = value + (other - value) * (grid - kl) / (other_kl - kl)
                best = torch.where((grid >= kl) & (grid <= other_kl), torch.maximum(best, mixed), best)
    reached, possible = (torch.trapezoid(curve - limit.base, grid).item() for curve in (best, limit.at(grid)))
    return reached / possible


def test_limit_and_area_agree_with_their_direct_computation(summary: Summary) -> None:
    for measure in MEASURES:
        limit = summary.limits[measure]
        for point in summary.points:
            gain = point.estimates[measure].value - limit.base
            share = gain / (limit.at(point.kl).item() - limit.base)
            assert point.estimates[f"{measure}_share"].value == pytest.approx(share, abs=2e-3)
        for method in summary.methods:
            points = [(point.kl, point.estimates[measure].value) for point in method.points]
            direct = area_under(points, summary.area_up_to[measure], limit)
            assert method.area[measure].value == pytest.approx(direct, abs=2e-3)


def test_matched_n_is_the_largest_without_more_reward(toy: Path, summary: Summary) -> None:
    rewards = torch.tensor(json.loads((toy / "reference.json").read_text())["rewards"], dtype=torch.float64)
    levels = {n: expected_max(rewards, n).mean().item() for n in range(1, 65)}
    rows = table((toy / "report.md").read_text(), "The point of each method with the highest reward")
    for method in summary.methods:
        best = method.best
        reached = max(n for n, level in levels.items() if level <= best.estimates["reward"].value)
        assert best.matches.value == reached
        assert rows[best.name]["N"].startswith(f"{reached} ")
        assert rows[best.name]["samples a request"] == f"{reached} → 1"
        assert best.matches.low <= reached <= best.matches.high


def test_pareto_front(summary: Summary) -> None:
    for measure in MEASURES:
        assert sum(method.front_share[measure] for method in summary.methods) == pytest.approx(1)
        on = {point.name: point.on_front[measure] for point in summary.points}
        assert on["J-BOND gamma=2"] == 1  # the least KL of all
        assert on["RLOO kl=0.03"] > 0.95  # the most reward
        assert on["RLOO kl=0.1"] < 0.2  # J-BOND has more reward at less KL


def test_interval_has_the_variance_of_seeds_and_prompts() -> None:
    """Of x[s, p] = a_s + b_p the mean has the variance Var(a) / S + Var(b) / P."""
    generator = torch.Generator().manual_seed(1)
    seeds, prompts = 30, 40
    a = torch.randn(seeds, generator=generator, dtype=torch.float64)
    b = 2 * torch.randn(prompts, generator=generator, dtype=torch.float64)
    resampling = Resampling(prompts, 4000)
    draws = resampling.mean(a.unsqueeze(-1) + b, resampling.weights(seeds))
    assert draws[0].item() == pytest.approx((a.mean() + b.mean()).item())
    expected = (a.var(correction=0) / seeds + b.var(correction=0) / prompts).item()
    assert draws[1:].var().item() == pytest.approx(expected, rel=0.1)


def test_comparisons_are_paired_by_prompt(small: Path) -> None:
    """A method with 0.1 more reward on each prompt is above by 0.1, whatever the prompts' difficulty."""
    first = cells_of(small)[0]
    reward = [value + 0.1 for value in first["evaluation"]["reward"]]
    second = {**first, "cell": "twin", "method": "twin", "label": "Twin"}
    second["evaluation"] = {**first["evaluation"], "reward": reward}
    summary = Summary(read_results(write_cells(small, [first, second])), 200)
    gap = next(c for c in summary.comparisons["reward"] if c.second == "Twin").gap
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.1, -0.1, -0.1), abs=1e-9)
    spread = summary.points[0].estimates["reward"]
    assert spread.high - spread.low > 0.3
    assert outcome(summary).startswith("Twin has the highest reward front, above J-BOND at equal KL")


def test_comparison_with_best_of_n_is_the_vertical_distance(small: Path) -> None:
    summary = Summary(read_results(write_cells(small, cells_of(small)[:1])), 50)
    (point,) = summary.points
    (comparison,) = summary.comparisons["reward"]
    kls, rewards, _ = summary.curve.mean()
    after = int(torch.searchsorted(kls, torch.tensor(point.kl, dtype=torch.float64)))
    share = (math.sqrt(point.kl) - kls[after - 1].sqrt()) / (kls[after].sqrt() - kls[after - 1].sqrt())
    bon = torch.lerp(rewards[after - 1], rewards[after], share).item()
    assert comparison.gap.value == pytest.approx(point.estimates["reward"].value - bon, abs=1e-9)
    assert comparison.low == comparison.high == pytest.approx(point.kl)


def test_methods_are_compared_only_where_both_have_points_around_the_kl(tmp_path: Path) -> None:
    """Below its only point a method's front is a chord from the reference, whatever its other strengths would reach.

    At the same efficiency no method is above another; before the chord of the one at 1.25 nats was 0.3 below at 0.5.
    """
    methods = (
        ("far", "Far", "s", {1: 1.5}, 0.95, 1.0),
        ("near", "Near", "s", {1: 0.5, 2: 0.95}, 0.95, 1.0),
        ("wide", "Wide", "s", {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}, 0.95, 1.0),
    )
    folder = write_toy(tmp_path / "toy", methods, failed="")
    summary = Summary(read_results(folder), RESAMPLES)
    found = {(c.first, c.second): c for c in summary.comparisons["reward"]}
    apart = found["Far", "Near"]
    assert all(math.isnan(value) for value in (apart.low, apart.high, apart.gap.value, apart.gap.low, apart.gap.high))
    kls = {point.name: point.kl for point in summary.points}
    inside = found["Far", "Wide"]
    assert inside.low == inside.high == pytest.approx(kls["Far s=1"])
    assert abs(inside.gap.value) < 0.15
    both = found["Near", "Wide"]
    assert both.low == pytest.approx(max(kls["Near s=1"], kls["Wide s=1"])) and both.high == kls["Near s=2"]
    write_cells(folder, [cell for cell in cells_of(folder) if cell["method"] != "wide"])
    assert re.search(
        "has the highest reward front, with no KL in common with (Far|Near);",
        outcome(Summary(read_results(folder), 20)),
    )
    write_report(folder, 20)
    markdown = (folder / "report.md").read_text()
    row = table(markdown, "At equal KL")["Far above Near"]
    assert (row["KL, nats"], row["reward"], row["win rate"]) == ("–", "–", "–")
    assert "no KL in common; more strengths are needed" in markdown


def test_a_kl_in_common_must_be_there_in_most_resamples(small: Path) -> None:
    """Two methods with one point each, whose KLs are the same on average over their seeds and not seed by seed."""
    first = cells_of(small)[0]
    cells = []
    for method in ("one", "other"):
        for seed, kl in ((1, 1.0), (2, 1.5)):
            cell = {**first, "cell": f"{method} {seed}", "method": method, "label": method, "seed": seed}
            cells.append({**cell, "evaluation": {**first["evaluation"], "kl": [kl] * PROMPTS}})
    summary = Summary(read_results(write_cells(small, cells)), 200)
    (apart,) = (c for c in summary.comparisons["reward"] if c.second == "other")
    assert math.isnan(apart.gap.value) and math.isnan(apart.low)


@pytest.mark.parametrize("label", ["RLOO", "vBoN on REINFORCE++ (cached rewards)", "a label of many words " * 6])
def test_legends_fit_into_the_picture(tmp_path: Path, label: str) -> None:
    folder = write_toy(tmp_path / "toy", failed="")
    cells = cells_of(folder)
    for cell in cells:
        cell["label"] = label + " " + cell["method"]
    found = Summary(read_results(write_cells(folder, cells)), 20)
    for figure in (figures.front(found, "reward"), figures.cost(found)):
        figures.png(figure)  # lays it out
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert legend.x0 >= whole.x0
        assert legend.x1 <= whole.x1
        assert legend.y0 >= whole.y0


def test_envelope_is_the_concave_hull() -> None:
    kl = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    value = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    found = envelope(torch.tensor([[0.0, 0.5, 1.0, 2.0, 3.0, 9.0]]), kl, value)
    assert found.tolist() == [[0.0, 0.5, 1.0, 1.5, 2.0, 2.0]]


def test_mean_of_curves_and_moving_average() -> None:
    runs = [(torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 1, 2])), (torch.tensor([0.5, 3]), torch.tensor([5.0, 10]))]
    tokens, mean = mean_curve(runs)
    assert tokens.tolist() == [1, 2]
    assert mean.tolist() == [(1 + 6) / 2, (2 + 8) / 2]
    ramp = torch.arange(40.0)
    assert torch.allclose(smoothed(ramp)[2:-2], ramp[2:-2])
    assert smoothed(torch.tensor([0.0, 2, 4, 0])).tolist() == [1, 2, 2, 2]


def test_binary_rewards_have_pass_at_k(small: Path) -> None:
    reference = json.loads((small / "reference.json").read_text())
    rewards = (torch.tensor(reference["rewards"], dtype=torch.float64) > 0.5).double()
    passes = {str(k): expected_max(rewards, k).tolist() for k in (1, 4, 64)}
    edit_reference(small, rewards=rewards.tolist(), evaluation={**reference["evaluation"], "pass_at": passes})
    cells = cells_of(small)
    for cell in cells:
        if cell["status"] == "done":
            cell["evaluation"]["reward"] = [min(1.0, value + 0.1) for value in rewards.mean(dim=-1).tolist()]
            cell["evaluation"]["pass_at"] = {"1": [0.25] * PROMPTS, "4": [0.75] * PROMPTS}
    write_report(write_cells(small, cells), 50)
    rows = table((small / "report.md").read_text(), "Problems solved within k samples")
    assert rows["J-BOND gamma=0"]["pass@4"] == "0.750"
    assert rows["reference"]["pass@4"].split()[0] == f"{expected_max(rewards, 4).mean().item():.3f}"


# The documents.


def test_outcome_names_the_leader(toy: Path) -> None:
    first = (toy / "report.md").read_text().split("\n\n")[1]
    assert first.startswith("**J-BOND has the highest reward front, above vBoN and RLOO at equal KL")
    assert "Best-of-9 of the reference" in first


def test_failed_runs_are_listed(toy: Path) -> None:
    markdown, page = (toy / "report.md").read_text(), (toy / "report.html").read_text()
    assert "1 of 24 runs failed" in markdown and "1 of 24 runs failed" in page
    assert "RuntimeError: out of memory <here>\nlast line" in markdown
    assert "RuntimeError: out of memory &lt;here&gt;\nlast line" in page


def test_what_the_intervals_cover_is_said(toy: Path, small: Path) -> None:
    markdown = (toy / "report.md").read_text()
    assert "48 evaluation prompts" in markdown and "128 samples of the reference" in markdown
    assert "2 to 3 seeds for each policy" in markdown and "seeds and of prompts together" in markdown
    alone = Summary(read_results(small), 20)
    assert "There is one seed for each policy: the intervals cover the choice of prompts only" in conditions(alone)


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects what a browser would load and the text that it would show."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_needs_nothing_beside_itself(toy: Path) -> None:
    page, text = Page(), (toy / "report.html").read_text()
    page.feed(text)
    page.close()
    assert not page.open
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert len(page.images) == 6 and all(len(image["alt"] or "") > 20 for image in page.images)
    assert len(page.addresses) == 6 and all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "@media print" in style
    assert 'name="viewport"' in text
    assert NASTY in page.text  # shown as it is, so it was escaped
    for address in page.addresses:
        root = ElementTree.fromstring(base64.b64decode(address.split(",", 1)[1]))
        references = [v for part in root.iter() for k, v in part.attrib.items() if k.endswith("href")]
        assert references and all(value.startswith("#") for value in references)


def test_markdown_escapes_and_has_its_pictures(toy: Path) -> None:
    markdown = (toy / "report.md").read_text()
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", markdown)
    assert len(pictures) == 6
    assert all((toy / name).read_bytes().startswith(b"\x89PNG\r\n") for name in pictures)
    assert "<script>" not in markdown and "<img" not in markdown
    assert "&lt;script&gt;" in markdown


def test_same_results_give_the_same_report(toy: Path) -> None:
    before = {path: path.read_bytes() for path in [*toy.glob("report.*"), *toy.glob("figures/*")]}
    files = write_report(toy, RESAMPLES)
    assert files[:2] == [toy / "report.html", toy / "report.md"]
    assert {path: path.read_bytes() for path in files} == before


def test_all_failed(small: Path) -> None:
    cells = [cell for cell in cells_of(small) if cell["status"] == "failed"]
    write_report(write_cells(small, cells), 20)
    assert "No run finished: all 1 failed." in (small / "report.md").read_text()


def test_far_from_the_reference_and_at_it(small: Path) -> None:
    """A policy that did not move, and one beyond Best-of-64 and the limit: dashes, no numbers that mean nothing."""
    cells = cells_of(small)[:2]
    cells[0]["evaluation"]["kl"] = [0.0] * PROMPTS
    cells[1]["evaluation"]["kl"] = [9.0] * PROMPTS
    write_report(write_cells(small, cells), 20)
    rows = table((small / "report.md").read_text(), "Against the limit at the policy's own KL")
    assert rows["J-BOND gamma=0"]["reward: % of the limit"] == "–"
    assert rows["J-BOND gamma=0.5"]["reward: % of the limit"] == "–"
    assert rows["J-BOND gamma=0.5"]["reward above Best-of-N"] == "–"


# What is wrong with a folder.


@pytest.mark.parametrize(
    "key", ["prompts", "rewards", "bon_levels", "evaluation", "title", "temperature", "examples"]
)
def test_missing_key_of_the_reference(small: Path, key: str) -> None:
    path = small / "reference.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=rf"reference\.json: '{key}' is missing"):
        read_results(small)


@pytest.mark.parametrize(
    "where",
    ["method", "strength", "training", "evaluation", "evaluation.kl", "evaluation.backward_kl", "training.curve.kl"],
)
def test_missing_key_of_a_cell(small: Path, where: str) -> None:
    cells = cells_of(small)
    *parents, key = where.split(".")
    inner = cells[1]
    for parent in parents:
        inner = inner[parent]
    del inner[key]
    with pytest.raises(ResultsError) as error:
        read_results(write_cells(small, cells))
    place = f"results.jsonl: line 2: cell 'jbond gamma=0.5 seed=1': {'.'.join(parents)}"
    assert place.removesuffix(" ") in str(error.value)
    assert str(error.value).endswith(f"{key!r} is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cell: cell["evaluation"].update(reward=[0.0]),
            r"reward: must have the shape \[48\], got \[1\]",
        ),
        (
            lambda cell: cell["evaluation"]["kl"].__setitem__(3, math.nan),
            "kl: holds a number that is not finite",
        ),
        (lambda cell: cell["evaluation"]["kl"].__setitem__(3, None), "evaluation.kl: must hold lists of numbers"),
        (lambda cell: cell["evaluation"]["forward_kl"].pop("8"), r"'forward_kl' lacks N = \[8\]"),
        (
            lambda cell: cell["evaluation"].update(distinct_1="x"),
            "distinct_1: must be a valid number, got 'x'",
        ),
        (
            lambda cell: cell["training"]["curve"]["kl"].pop(),
            "differ in length: generated_tokens 40, reward 40, kl 39",
        ),
        (lambda cell: cell.update(status="running"), "status: must be 'done' or 'failed', got 'running'"),
        (lambda cell: cell.update(seed="1"), "seed: must be a valid integer, got '1'"),
        (lambda cell: cell.update(cell="jbond gamma=0.5 seed=1"), "a second cell 'jbond gamma=0.5 seed=1'"),
    ],
)
def test_wrong_values(small: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    cells = cells_of(small)
    change(cells[0])
    with pytest.raises(ResultsError, match=message):
        read_results(write_cells(small, cells))


def test_methods_with_one_label_are_told_apart(small: Path) -> None:
    cells = [{**cells_of(small)[0], "cell": name, "method": name} for name in ("one", "other")]
    assert [cell.label for cell in read_results(write_cells(small, cells)).cells] == [
        "J-BOND (one)",
        "J-BOND (other)",
    ]


def test_unreadable_files(small: Path) -> None:
    path = small / "results.jsonl"
    path.write_text(path.read_text() + '{"cell": "cut sh')
    with pytest.raises(ResultsError, match=r"results\.jsonl: line 4 is not JSON: .* remove it"):
        read_results(small)
    path.write_text("\n")
    with pytest.raises(ResultsError, match="has no cell"):
        read_results(small)
    path.unlink()
    with pytest.raises(ResultsError, match=r"results\.jsonl: no such file; give the --output-dir"):
        read_results(small)
