"""Best-of-Poisson and the exponential tilt: formulas, estimators by enumeration, gradients, and ends of training."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy
import pytest
import test_algorithms_exact as sampled
import test_pooled_exact as small
import torch
from enumerated import examples, f64
from hypothesis import given
from hypothesis import strategies as st
from test_lab import STRICT, TIED, kl
from test_pooled import BEHAVIOUR, POLICY, SOURCE, by_types, close, expectations, weights_of
from torch import Tensor

from bond_plugin.algorithms.base import AdvantageInputs
from bond_plugin.algorithms.bond import BOND, BONDConfig
from bond_plugin.algorithms.jbond import JBOND, JBONDConfig
from bond_plugin.algorithms.vbon import VBoN, VBoNConfig
from bond_plugin.bestofn.distribution import level_probabilities, log_bon_ratio, quantiles
from bond_plugin.bestofn.limits import win_rate_front
from bond_plugin.bestofn.targets import TAIL, BestOfN, BestOfPoisson, Exponential, Target, target_of
from bond_plugin.cli.main import main
from bond_plugin.lab import programme
from bond_plugin.lab.estimators import draw_gradients
from bond_plugin.lab.learner import train
from bond_plugin.lab.methods import CACHE, build
from bond_plugin.lab.problem import Problem

#: By their flags.
FLAGS: dict[str, dict[str, Any]] = {
    "poisson": {"target": "best_of_poisson", "n": 2.5},
    "exponential": {"target": "exponential", "temperature": 0.4},
}
BOTH = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def of(flags: dict[str, Any]) -> Target:
    return target_of(flags["target"], flags.get("n", 0), flags.get("temperature", 0))


# --- formulas -------------------------------------------------------------------------------------------------------


def integral(target: Target, f: Any) -> Any:
    """G to 50 digits."""
    if isinstance(target, BestOfN):
        return f**target.n
    mu = mpmath.mpf(target.rate)
    if isinstance(target, BestOfPoisson):
        return f * mpmath.exp(-mu * (1 - f))
    return mpmath.expm1(mu * f) / mpmath.expm1(mu)


@given(
    st.sampled_from([BestOfN(2), BestOfN(16)])
    | st.builds(lambda c, e: c(10.0**e), st.sampled_from([BestOfPoisson, Exponential]), st.floats(-6, 4)),
    st.floats(0, 1),
    st.floats(-18, 0),
)
@examples(300)
def test_the_factor_of_a_level_is_the_difference_of_integrals(target: Target, low: float, power: float) -> None:
    high = min(1.0, low + 10.0**power)
    with mpmath.workdps(80):
        a, b = mpmath.mpf(low), mpmath.mpf(high)
        if a == b:
            wanted = mpmath.log(mpmath.diff(lambda f: integral(target, f), a)) if low or not target.vanishes else None
        else:
            wanted = mpmath.log((integral(target, b) - integral(target, a)) / (b - a))
    if wanted is not None:
        found = target.log_tilt(f64([low]), f64([high]))
        assert found.item() == pytest.approx(float(wanted), rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("target", [BestOfPoisson(1.5), Exponential(2.5), Exponential(1e-3)], ids=str)
def test_each_is_the_best_of_a_random_number(target: Target) -> None:
    """G(F) = sum_j P(n = j) F^j, so that the two views are one; and what is above the last counts as the last."""
    f = torch.linspace(0, 1, 11, dtype=torch.float64)
    law = target.law(60)
    series = (law * f.unsqueeze(-1) ** torch.arange(1, 61)).sum(dim=-1)
    close(series[1:], f[1:] * target.log_tilt(torch.zeros(10), f[1:]).exp())
    close(target.law(3), torch.cat([law[:2], law[2:].sum().reshape(1)]))


@pytest.mark.parametrize("target", [c(r) for c in (BestOfPoisson, Exponential) for r in (0.1, 3, 40)], ids=str)
def test_enough_samples_are_those_that_n_is_seldom_above(target: Target) -> None:
    law = target.law(200)
    assert law[target.samples :].sum() <= TAIL < law[target.samples - 1 :].sum()


@pytest.mark.parametrize(("flags", "says"), [
    ({"n": 2.5}, "--bond.n must be a whole number, got 2.5: --bond.target best_of_poisson"),
    ({"n": math.inf}, "--bond.n must be a whole number, got inf"),
    ({"target": "best_of_poisson", "n": 1}, "--bond.n must be above 1"),
    ({"target": "best_of_poisson", "n": math.nan}, "--bond.n must be above 1"),
    ({"target": "exponential", "temperature": 0.0}, "--bond.temperature must be at least 0.0001"),
    ({"target": "exponential", "temperature": math.inf}, "--bond.temperature must be at least"),
])  # fmt: skip
def test_strengths_out_of_range_are_refused(flags: dict[str, Any], says: str) -> None:
    for config in (JBONDConfig, BONDConfig):
        with pytest.raises(ValueError, match=re.escape(says)):
            config(**flags)
    with pytest.raises(ValueError, match=re.escape(says.replace("--bond", "--vbon"))):
        VBoNConfig(**flags, reward_cache="x")


def test_combinations_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Eq. 17.*use --bond.n_anchor_samples 0, or --bond.estimator pooled"):
        JBONDConfig(target="exponential", n_anchor_samples=2)
    with pytest.raises(ValueError, match=r"--bond.n_anchor_samples 16 is less than 18: the forward term"):
        BONDConfig(target="exponential", temperature=0.1)
    assert BOND(BONDConfig(target="exponential", temperature=0.1, beta=1.0)).needs().source_samples == 16
    assert BOND(BONDConfig(target="exponential", temperature=0.1, reward_cache="x")).needs().source_samples == 18
    assert JBOND(JBONDConfig(target="exponential", temperature=0.1)).needs().least == 18
    assert JBOND(JBONDConfig(target="exponential", temperature=0.1, beta=1.0)).needs().least == 2


# --- the pooled estimators, by enumeration of all draws -------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("rewards", [f64([1.0, 0.0, 2.0]), f64([1.0, 0.0, 1.0])], ids=["strict", "tied"])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_the_factor_is_unbiased_for_the_best_of_min_n_s(flags: dict[str, Any], rewards: Tensor, size: int) -> None:
    target = of(flags)
    levels = level_probabilities(SOURCE, rewards)
    wanted = sum(
        share * log_bon_ratio(*levels, j).exp() for j, share in enumerate(target.law(size).tolist(), start=1)
    )
    for mu in (POLICY, BEHAVIOUR):
        close(expectations(lambda r, a: target.pooled(r, a)[0], rewards, size, mu=mu), wanted)
    # and that is the target itself where n is seldom above
    if size == 6:
        assert (wanted / target.log_tilt(*levels).exp() - 1).abs().max() < 0.05


def expected_log(target: Target, rewards: Tensor, size: int, mu: Tensor, source: Tensor) -> Tensor:
    """The series and the mean at F half-way, and the part for ties by a sum over all counts of the others' levels."""
    low, high = level_probabilities(source, rewards)
    above, k = 1 - (low + high) / 2, size - 1
    ratio = target.rate / (1 + target.rate) if isinstance(target, BestOfPoisson) else 0.0
    found = -sum((ratio * above) ** j / j for j in range(1, k + 1)) - target.rate * above
    others = torch.tensor(list(itertools.product(range(len(mu)), repeat=k)))
    probability, weight = mu[others].prod(dim=-1), (source / mu)[others]
    for i, mine in enumerate(rewards):
        below, equal = ((weight * sign).sum(dim=-1) / k for sign in (rewards[others] < mine, rewards[others] == mine))
        tied = target.log_tilt(below, below + equal) - target.log_tilt(below + equal / 2, below + equal / 2)
        found[i] += (probability * tied).sum()
    return found


@BOTH
@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_logarithm_without_ties_is_that_of_the_series(flags: dict[str, Any], size: int) -> None:
    """A sample with a quantile of its own among others of three generations: no part of it has a bias then."""
    target = of(flags)
    others = torch.cartesian_prod(*[torch.arange(3)] * (size - 1)).reshape(-1, size - 1)
    probability = POLICY[others].prod(dim=-1)
    weight = weights_of(1, 0)[others]
    for place, f in ((-0.5, 0.0), (0.5, SOURCE[0]), (1.5, SOURCE[:2].sum()), (2.5, 1.0)):
        rewards = torch.cat([torch.full((len(others), 1), place), others.double()], dim=-1)
        weights = torch.cat([torch.ones(len(others), 1), weight], dim=-1)
        found = (target.pooled(rewards, weights)[1][:, 0] * probability).sum().item()
        ratio = target.rate / (1 + target.rate) if isinstance(target, BestOfPoisson) else 0.0
        wanted = -sum((ratio * (1 - f)) ** j / j for j in range(1, size)) - target.rate * (1 - f)
        assert found == pytest.approx(float(wanted), abs=1e-12)
        if isinstance(target, Exponential):  # of which nothing is cut off
            one = f64([1.0])
            assert found == pytest.approx((target.log_tilt(one * f, one * f) - target.log_tilt(one, one)).item())


@BOTH
@pytest.mark.parametrize("rewards", [f64([1.0, 0.0, 2.0]), f64([1.0, 0.0, 1.0])], ids=["strict", "tied"])
def test_the_logarithm_with_ties_is_what_the_docstring_says(flags: dict[str, Any], rewards: Tensor) -> None:
    target = of(flags)
    found = expectations(lambda r, a: target.pooled(r, a)[1], rewards, 4)
    close(found, expected_log(target, rewards, 4, POLICY, SOURCE))


@pytest.mark.parametrize(("target", "wanted", "without"), [
    (Exponential(10), (0.080, 0.038, 0.019), 1.7), (BestOfPoisson(7), (0.058, 0.028, 0.014), 1.3),
    (BestOfN(4), (0.020, 0.007, 0.003), 0.69), (BestOfN(8), (0.077, 0.036, 0.0175), 2.77),
], ids=str)  # fmt: skip
def test_bias_for_ties_falls_with_the_samples(target: Target, wanted: tuple[float, ...], without: float) -> None:
    """The figures of the docstring, for both weights and normalised ones, which are the same here."""
    law, rewards, one = f64([0.75, 0.25]), f64([0.0, 1.0]), f64([1.0])
    low, high = level_probabilities(law, rewards)
    exact = target.log_tilt(low, high) - target.log_tilt(one, one)
    for size, bias in zip((8, 16, 32), wanted, strict=True):
        for normalised in (False, True):
            found = by_types(lambda r, a, it=normalised: target.pooled(r, a, it)[1], rewards, size, law, law)
            assert (found - exact).abs().max().item() == pytest.approx(bias, abs=5e-4)
    middle = (low + high) / 2
    off = target.log_tilt(middle, middle) - target.log_tilt(one, one) - exact
    assert off.abs().max().item() == pytest.approx(without, abs=0.05)


# --- gradients, through what training runs --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("rewards", [small.STRICT, small.TIED], ids=["strict", "tied"])
@pytest.mark.parametrize(("beta", "samples", "prompts"), [(0.0, 3, 1), (1.0, 3, 1), (0.3, 2, 1)])
def test_pooled_gradient_is_that_of_the_objective(
    flags: dict[str, Any], rewards: Tensor, beta: float, samples: int, prompts: int
) -> None:
    """Forward to the best of min(n, S) samples of the anchor, backward with the expected log g."""
    target = of(flags)
    mu, anchor = (small.tokens_of(t).sum(-1).exp().detach() for t in (small.POLICY, small.ANCHOR))
    levels, log_pi = level_probabilities(anchor, rewards), small.tokens_of(small.POLICY).sum(-1)
    law = target.law(samples).tolist()
    aim = anchor * sum(share * log_bon_ratio(*levels, j).exp() for j, share in enumerate(law, start=1))
    log_tilt = expected_log(target, rewards, samples, mu, anchor)
    value = -(1 - beta) * (aim * log_pi).sum() + beta * (log_pi.exp() * (log_pi - anchor.log() - log_tilt)).sum()
    wanted = torch.autograd.grad(value, small.POLICY)[0]
    algorithms = (
        JBOND(JBONDConfig(beta=beta, **flags)),
        BOND(BONDConfig(beta=beta, n_anchor_samples=0, anchor="ema", **flags)),
    )
    for algorithm in algorithms:
        found = small.expected(algorithm.advantages, rewards, samples, prompts)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@BOTH
@pytest.mark.parametrize("rewards", [sampled.STRICT, sampled.TIED], ids=["strict", "tied"])
@pytest.mark.parametrize(("baseline", "n_policy"), [("none", 1), ("leave_one_out", 2)])
def test_bond_with_exact_quantiles_has_the_gradient_of_the_kl(
    flags: dict[str, Any], rewards: Tensor, baseline: str, n_policy: int
) -> None:
    algorithm = BOND(BONDConfig(beta=1.0, baseline=baseline, reward_cache="-", **flags))
    found = sampled.expected_gradient(algorithm, rewards, sampled.population(rewards, 1), n_policy)
    levels = level_probabilities(sampled.ANCHOR.exp(), rewards)
    wanted = sampled.backward_gradient(sampled.ANCHOR + of(flags).log_tilt(*levels))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("m", [4, 12])
@BOTH
def test_the_forward_term_takes_the_best_of_a_random_number(flags: dict[str, Any], m: int) -> None:
    """How often the r-th of m samples is chosen: sum_j P(min(n, m) = j) C(r - 1, j - 1) / C(m, j)."""
    algorithm, draws = BOND(BONDConfig(beta=0.0, n_anchor_samples=16, **flags)), 40_000
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(draws, m, generator=generator, dtype=torch.float64)
    chosen = algorithm.select(rewards, generator)
    rank = rewards.argsort(dim=-1).argsort(dim=-1).gather(-1, chosen).flatten()
    law = of(flags).law(m).tolist()
    for r in range(m):
        share = sum(p * math.comb(r, j - 1) / math.comb(m, j) for j, p in enumerate(law, start=1))
        error = math.sqrt(share * (1 - share) / draws)
        assert (rank == r).double().mean().item() == pytest.approx(share, abs=5 * error + 1e-9)
    equal = algorithm.select(torch.zeros(draws, 2), generator)
    assert equal.double().mean().item() < 0.5  # the second of two only where n is above one
    lowest = torch.full((5, m), torch.finfo(torch.float64).min, dtype=torch.float64)
    assert ((algorithm.select(lowest, generator) >= 0) & (algorithm.select(lowest, generator) < m)).all()


def test_a_learned_quantile_is_put_into_g() -> None:
    algorithm = BOND(BONDConfig(beta=1.0, quantile="learned", correction=False, baseline="none", **FLAGS["poisson"]))
    zero = torch.zeros(2, 2, dtype=torch.float64)
    logits = f64([[-1.0, 0.5], [2.0, 0.0]])
    batch = AdvantageInputs(
        rewards=f64([[0.0, 1.0], [2.0, 3.0]]),
        source_rewards=f64([[0.5], [2.5]]),
        under={name: zero.unsqueeze(-1) for name in ("policy", "reference")},
        generator=torch.Generator(),
        classifier_logits=logits,
    )
    f = logits.sigmoid()
    torch.testing.assert_close(algorithm.advantages(batch).advantages, torch.log(1 + 1.5 * f) - 1.5 * (1 - f))


# --- vBoN -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bound", ["l1", "exact", "tied"])
def test_vbon_has_the_target_for_its_optimum(flags: dict[str, Any], bound: str) -> None:
    """pi_ref exp(reward / coefficient), with quantiles put in exactly. l1 leaves a generation's own mass out."""
    transform, target = VBoN(VBoNConfig(bound=bound, reward_cache="-", **flags)), of(flags)
    rewards = sampled.TIED if bound == "tied" else sampled.STRICT
    log_ref, pool = sampled.ANCHOR.unsqueeze(0), sampled.population(rewards, 1).unsqueeze(0)
    batch = AdvantageInputs(
        rewards.unsqueeze(0), rewards[None, :0], {"reference": log_ref.unsqueeze(-1)}, torch.Generator(), pool
    )
    out = transform.transform(batch).rewards
    optimum = (log_ref + out / transform.kl_coefficient).log_softmax(dim=-1)
    low, high = level_probabilities(log_ref.exp(), rewards.unsqueeze(0))
    exact = log_ref + target.log_tilt(low, low if bound == "l1" else high)
    torch.testing.assert_close(optimum, exact.log_softmax(dim=-1))
    if bound != "l1":
        assert exact.logsumexp(dim=-1).item() == pytest.approx(0.0, abs=1e-6)
    elif isinstance(target, Exponential):  # the reward is F itself but for a constant, the coefficient T
        assert transform.kl_coefficient == pytest.approx(0.4)
        torch.testing.assert_close(out - out.mean(), low - low.mean())


def test_without_the_flag_nothing_is_another() -> None:
    """best_of_n said and not said, bit by bit, in all three."""
    rewards = torch.randint(4, (3, 6), generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = AdvantageInputs(
        rewards, rewards[:, :0], {"policy": tokens, "anchor": tokens.flip(0), "reference": -tokens.square()},
        torch.Generator(), rewards.flip(0),
    )  # fmt: skip
    for make in (
        lambda **more: JBOND(JBONDConfig(**more)).advantages(replace(batch, reference_rewards=None)).advantages,
        lambda **more: BOND(BONDConfig(n=4, beta=1.0, reward_cache="-", **more)).advantages(batch).advantages,
        lambda **more: VBoN(VBoNConfig(n=4, reward_cache="-", **more)).transform(batch).rewards,
    ):
        assert torch.equal(make(), make(target="best_of_n", temperature=3.0))


# --- training, in the laboratory ------------------------------------------------------------------------------------

# Where the anchor of J-BOND does not move, its target does not either.
ENDS: dict[str, tuple[str, dict[str, Any], Problem, float]] = {
    "bond sampled": ("bond", {"beta": 0.5, **FLAGS["poisson"]}, STRICT, 3e-3),
    "bond cached": ("bond", {"beta": 1.0, "reward_cache": CACHE, **FLAGS["exponential"]}, TIED, 1e-3),
    "bond pooled": ("bond", {"beta": 1.0, "n_anchor_samples": 0, **FLAGS["exponential"]}, STRICT, 3e-3),
    "bond pooled, cached": (
        "bond", {"beta": 0.5, "n_anchor_samples": 0, "reward_cache": CACHE, **FLAGS["poisson"]}, STRICT, 3e-3
    ),
    "jbond pooled": ("jbond", {"eta": 0.0, **FLAGS["poisson"]}, STRICT, 1e-2),
    "jbond pooled, ties": ("jbond", {"eta": 0.0, **FLAGS["exponential"]}, TIED, 3e-3),
    "vbon poisson": ("vbon", {"bound": "exact", **FLAGS["poisson"]}, STRICT, 1e-3),
    "vbon exponential": ("vbon", {"bound": "tied", **FLAGS["exponential"]}, TIED, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "problem", "reached"), ENDS.values(), ids=ENDS)
def test_training_ends_at_the_exact_distribution(
    name: str, settings: dict[str, Any], problem: Problem, reached: float
) -> None:
    method, policy = build(name, **settings), problem.policy()
    target = of(settings)
    train(problem, method, policy, target, programme.training_of(method, seed=7))
    found = policy.log_probs().detach()
    aim = problem.best_of(target)
    assert aim.logsumexp(dim=0).item() == pytest.approx(0.0, abs=1e-12)
    assert kl(found, aim) < reached < 0.05 < kl(problem.log_ref, aim)


@BOTH
def test_bond_lab_measures_against_the_target_itself(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programme, "draw_gradients", partial(draw_gradients, batches=40))
    argv = ["lab", "--algorithm", "vbon", "--vbon.bound", "tied", "--output-dir", str(tmp_path / "lab")]
    argv += [word for key, value in flags.items() for word in (f"--vbon.{key}", str(value))]
    assert main(argv) == 0
    target, printed = of(flags), capsys.readouterr().out
    for words in (f"vbon, against {target}", f"{target}, exact", "KL(pi||aim)", "KL(pi || aim)"):
        assert words in printed
    report = json.loads((tmp_path / "lab" / "lab.json").read_text())
    exact, end = (row["point"] for row in report["tables"]["one"]["rows"][1:3])
    mass = STRICT.best_of(target).exp()
    assert exact["kl_to_bon"] == pytest.approx(0.0, abs=1e-12)
    assert exact["reward"] == pytest.approx((mass * STRICT.rewards).sum().item())
    assert end["kl_to_bon"] < 2e-3
    backward = next(e for e in report["estimators"] if e["against"] == "KL(pi || aim)")
    assert backward["error"]["z"] < 4


# --- what the strengths are worth -----------------------------------------------------------------------------------


def continuous(target: Target) -> tuple[float, float]:
    """KL to the source, and the win rate E[F], of a continuous reward: integrals over F by Gauss's rule."""
    nodes, shares = (torch.as_tensor(x) for x in numpy.polynomial.legendre.leggauss(100))
    f, share = (1 + nodes) / 2, shares / 2
    log_g = target.log_tilt(f, f)
    return (share * log_g.exp() * log_g).sum().item(), (share * log_g.exp() * f).sum().item()


def at_kl(of_rate: Callable[[float], Target], wanted: float) -> Target:
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if continuous(of_rate(middle))[0] < wanted else (low, middle)
    return of_rate(low)


def test_the_table_of_win_rates_at_equal_kl() -> None:
    """Every figure of docs/lab.md's, by closed forms where there are some, and the front that `bond bench` draws."""
    page = (Path(__file__).parents[1] / "docs" / "lab.md").read_text()
    rows = [re.findall(r"[\d.]+", line) for line in page.splitlines() if re.match(r"\| \d+ \| \d\.\d{4} \|", line)]
    assert [int(row[0]) for row in rows] == [2, 4, 8, 16]
    rewards = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).double()
    front = win_rate_front(rewards.unsqueeze(0))
    for n, *figures in rows:
        best = BestOfN(int(n))
        found_kl, rate = continuous(best)
        assert (found_kl, rate) == (
            pytest.approx(math.log(best.n) - 1 + 1 / best.n),
            pytest.approx(best.n / (best.n + 1)),
        )
        poisson, exponential = at_kl(BestOfPoisson, found_kl), at_kl(Exponential, found_kl)
        of_poisson, limit = continuous(poisson)[1], continuous(exponential)[1]
        mu = poisson.rate
        assert of_poisson == pytest.approx(1 - 1 / mu - math.expm1(-mu) / mu**2)
        assert limit == pytest.approx(1 / -math.expm1(-exponential.rate) - 1 / exponential.rate)
        assert limit == pytest.approx(front.at(found_kl).item(), abs=1e-4)
        assert rate < of_poisson < limit
        wanted = [found_kl, rate, of_poisson, limit, 1 + mu, 1 / exponential.rate]
        assert [f"{x:.{len(y.partition('.')[2])}f}" for x, y in zip(wanted, figures, strict=True)] == figures


def test_quantiles_of_finite_targets_do_not_count_the_sample_itself() -> None:
    """With it the exponential's log g would be k / (k + 1) of what it is: a higher temperature."""
    rewards, pool = f64([[0.5]]), f64([[0.0, 1.0, 2.0, 3.0]])
    assert [x.item() for x in quantiles(rewards, pool)] == [0.25, 0.25]
    under = dict.fromkeys(("policy", "reference"), torch.zeros(1, 1, 1, dtype=torch.float64))
    batch = AdvantageInputs(rewards, rewards[:, :0], under, torch.Generator(), pool)
    algorithm = BOND(BONDConfig(beta=1.0, baseline="none", reward_cache="-", **FLAGS["exponential"]))
    zero = replace(batch, rewards=rewards - 1)
    higher, lower = (algorithm.advantages(b) for b in (batch, zero))
    assert (higher.advantages - lower.advantages).item() == pytest.approx(0.25 / 0.4)
    assert math.isfinite(lower.metrics["bond/log_quantile"])
