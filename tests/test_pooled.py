"""The pooled estimators against brute force in fractions, and their expectations by enumeration of all draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from enumerated import bon_log_probs, examples, f64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bond_plugin.bestofn import pooled
from bond_plugin.bestofn.baselines import leave_one_out_mean
from bond_plugin.bestofn.distribution import level_probabilities, log_bon_ratio
from bond_plugin.bestofn.pooled import effective_sample_size, harmonic_log_quantile, mixture_weights, pooled_tilt


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# --- brute force over subsets ---------------------------------------------------------------------------------------

Prompt = tuple[list[int], list[Fraction]]


@st.composite
def prompts(draw: st.DrawFn, most: int = 7, zeros: bool = False) -> Prompt:
    """Rewards of few levels, and weights."""
    size = draw(st.integers(2, most))
    levels = draw(st.sampled_from([0, 1, 2, 9]))
    rewards = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    weights = draw(st.lists(st.integers(0 if zeros else 1, 40), min_size=size, max_size=size))
    return rewards, [Fraction(weight, 8) for weight in weights]


def tensors(prompt: Prompt) -> tuple[Tensor, Tensor]:
    return f64([prompt[0]]), f64([[float(weight) for weight in prompt[1]]])


def symmetric(weights: Sequence[Fraction], j: int) -> Fraction:
    return sum((math.prod(subset, start=Fraction(1)) for subset in itertools.combinations(weights, j)), Fraction())


def tilt_by_subsets(prompt: Prompt, n: int, normalised: bool) -> list[Fraction]:
    rewards, weights = prompt
    found = []
    for i, mine in enumerate(rewards):
        others = [j for j in range(len(rewards)) if j != i]
        total = Fraction()
        for subset in itertools.combinations(others, n - 1):
            if all(rewards[j] <= mine for j in subset):
                ties = sum(rewards[j] == mine for j in subset)
                total += math.prod(weights[j] for j in subset) / (1 + ties)
        whole = symmetric([weights[j] for j in others], n - 1) if normalised else math.comb(len(others), n - 1)
        found.append(n * total / whole if whole else Fraction())
    return found


def log_quantile_by_subsets(prompt: Prompt, normalised: bool) -> list[Fraction]:
    """Of those that are better, and of half of each equal."""
    rewards, weights = prompt
    found = []
    for i, mine in enumerate(rewards):
        others = [j for j in range(len(rewards)) if j != i]
        above = [
            weights[j] if rewards[j] > mine else weights[j] / 2 if rewards[j] == mine else Fraction() for j in others
        ]
        total = Fraction()
        for j in range(1, len(rewards)):
            whole = symmetric([weights[k] for k in others], j) if normalised else math.comb(len(others), j)
            total -= symmetric(above, j) / whole / j if whole else 0
        found.append(total)
    return found


@given(prompts(zeros=True), st.integers(2, 7), st.booleans())
@examples(150)
def test_tilt_is_the_sum_over_all_subsets(prompt: Prompt, n: int, normalised: bool) -> None:
    n = min(n, len(prompt[0]))
    found = pooled_tilt(*tensors(prompt), n, normalised)
    close(found, f64([[float(g) for g in tilt_by_subsets(prompt, n, normalised)]]))


@given(prompts(zeros=True), st.booleans())
@examples(150)
def test_log_quantile_is_the_sum_over_all_subsets(prompt: Prompt, normalised: bool) -> None:
    found = harmonic_log_quantile(*tensors(prompt), normalised)
    close(found, f64([[float(g) for g in log_quantile_by_subsets(prompt, normalised)]]))


@pytest.mark.parametrize("size", [2, 7, 49, 98])
def test_with_equal_weights_the_log_quantile_is_a_difference_of_harmonic_numbers(size: int) -> None:
    table = f64([0.0, *itertools.accumulate(1 / j for j in range(1, size + 1))])
    ranks = torch.randperm(size, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    for scale, normalised in ((1.0, True), (1.0, False), (2.5, True)):
        found = harmonic_log_quantile(ranks, torch.full((1, size), scale), normalised)
        close(found, table[ranks] - table[size - 1], 1e-11)
        # ranks' sum is fixed: so is their mean, in whatever order the samples lie
        assert found.mean().item() == pytest.approx(1 / size - 1, abs=1e-11)
        # so that the leave-one-out mean makes them S / (S - 1) times as far apart
        close((found - leave_one_out_mean(found, dim=-1)).diff(), found.diff() * size / (size - 1), 1e-11)
    close(pooled_tilt(ranks, torch.ones(1, size), 2)[0], 2 * ranks[0].double() / (size - 1))


def test_prompts_are_computed_each_for_itself_also_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.randint(4, (7, 9), generator=generator), torch.rand(7, 9, generator=generator)
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda r, a: pooled_tilt(r, a, 3),
        lambda r, a: pooled_tilt(r, a, 9, normalised=True),
        lambda r, a: harmonic_log_quantile(r, a),
        lambda r, a: harmonic_log_quantile(r, a, normalised=True),
    ]
    together = [call(rewards, weights) for call in calls]
    monkeypatch.setattr(pooled, "_CHUNK", 100)  # one to three prompts a block
    order = torch.randperm(9, generator=generator)
    for call, whole in zip(calls, together, strict=True):
        close(call(rewards, weights), whole, 1e-14)
        for row in range(7):
            close(call(rewards[row : row + 1], weights[row : row + 1]), whole[row : row + 1], 1e-13)
        close(call(rewards[:, order], weights[:, order]), whole[:, order])


@pytest.mark.parametrize("size", [12, 24])
def test_weights_of_any_range_neither_overflow_nor_vanish(size: int) -> None:
    """Each weight a power of two between 2^-1000 and 2^1000: products far beyond float64 either way."""
    generator = torch.Generator().manual_seed(size)
    powers = torch.randint(-1000, 1001, (size,), generator=generator)
    rewards = torch.randint(6, (1, size), generator=generator).double()
    weights = torch.ldexp(torch.ones(1, size, dtype=torch.float64), powers)
    exact = [Fraction(weight) for weight in weights[0].tolist()]

    def polynomial(members: list[int]) -> list[Fraction]:
        found = [Fraction(1)]
        for j in members:
            padded = [*found, Fraction()]
            found = [high + exact[j] * low for high, low in zip(padded, [Fraction(), *found], strict=True)]
        return found

    values = rewards[0].tolist()
    tilts: dict[int, list[float]] = {n: [] for n in (2, 5, size)}
    log_quantiles = []
    for i, mine in enumerate(values):
        others = [j for j in range(size) if j != i]
        total = polynomial(others)
        ties = polynomial([j for j in others if values[j] == mine])
        sides = [polynomial([j for j in others if side(values[j], mine)]) for side in (float.__lt__, float.__gt__)]
        counted = [[e / (1 + t) for t, e in enumerate(ties)], [e / 2**t for t, e in enumerate(ties)]]
        below, above = (
            [sum(side[j - t] * e for t, e in enumerate(tied) if 0 <= j - t < len(side)) for j in range(size)]
            for side, tied in zip(sides, counted, strict=True)
        )
        for n, found in tilts.items():
            found.append(float(n * below[n - 1] / total[n - 1]))
        log_quantiles.append(float(-sum(above[j] / total[j] / j for j in range(1, size))))
    for n, wanted in tilts.items():
        close(pooled_tilt(rewards, weights, n, normalised=True), f64([wanted]), 1e-11)
    close(harmonic_log_quantile(rewards, weights, normalised=True), f64([log_quantiles]), 1e-11)


@given(prompts(), st.integers(2, 7), st.floats(-200, 200))
@examples(60)
def test_normalised_forms_stay_in_their_range_and_do_not_see_the_scale(prompt: Prompt, n: int, power: float) -> None:
    rewards, weights = tensors(prompt)
    n = min(n, rewards.shape[-1])
    tilt, log_quantile = pooled_tilt(rewards, weights, n, True), harmonic_log_quantile(rewards, weights, True)
    assert ((tilt >= 0) & (tilt <= n + 1e-12)).all()
    lowest = -sum(1 / j for j in range(1, rewards.shape[-1]))
    assert ((log_quantile <= 0) & (log_quantile >= lowest - 1e-12)).all()
    close(pooled_tilt(rewards, weights * 10.0**power, n, True), tilt, 1e-10)
    close(harmonic_log_quantile(rewards, weights * 10.0**power, True), log_quantile, 1e-10)


def test_samples_of_weight_zero_are_as_if_they_were_not_there() -> None:
    rewards, weights = f64([[3, 1, 2, 2, 5]]), f64([[2.0, 0.0, 1.0, 3.0, 0.0]])
    kept = [0, 2, 3]
    for call in (
        lambda r, a: harmonic_log_quantile(r, a, True),
        lambda r, a: pooled_tilt(r, a, 2, True),
        lambda r, a: pooled_tilt(r, a, 3, True),
    ):
        close(call(rewards, weights)[:, kept], call(rewards[:, kept], weights[:, kept]))
    nothing = torch.zeros_like(weights)
    for normalised in (True, False):
        assert pooled_tilt(rewards, nothing, 2, normalised).eq(0).all()
        assert harmonic_log_quantile(rewards, nothing, normalised).eq(0).all()


# --- expectations, by enumeration of all draws ----------------------------------------------------------------------

# Three generations: how often the policy, the source of Best-of-N and another behaviour policy draw each of them.
POLICY, SOURCE, BEHAVIOUR = f64([0.2, 0.3, 0.5]), f64([0.4, 0.2, 0.4]), f64([0.3, 0.4, 0.3])
STRICT, TIED = f64([1.0, 0.0, 2.0]), f64([1.0, 0.0, 1.0])
REWARDS = pytest.mark.parametrize("rewards", [STRICT, TIED], ids=["strict", "tied"])

Estimator = Callable[[Tensor, Tensor], Tensor]


def all_draws(laws: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All sequences of independent draws, one of each law, ``[R, S]``, and their probabilities ``[R]``."""
    draws = torch.cartesian_prod(*[torch.arange(len(law)) for law in laws]).reshape(-1, len(laws))
    return draws, math.prod(law[draws[:, i]] for i, law in enumerate(laws))


def weights_of(n: int, m: int, mu: Tensor = POLICY) -> Tensor:
    """a of each generation, by its definition."""
    return SOURCE / ((n * mu + m * SOURCE) / (n + m))


def expectations(
    estimate: Estimator, rewards: Tensor, n: int, m: int = 0, own: int = 0, mu: Tensor = POLICY
) -> Tensor:
    """E[estimate of sample ``own`` | its generation], one a generation; n samples of mu, m of the source."""
    laws = [mu] * n + [SOURCE] * m
    del laws[own]
    others, probability = all_draws(laws)
    weight, found = weights_of(n, m, mu), []
    for y in range(len(rewards)):
        draws = torch.cat([others[:, :own], torch.full_like(others[:, :1], y), others[:, own:]], dim=-1)
        found.append((estimate(rewards[draws], weight[draws])[:, own] * probability).sum())
    return torch.stack(found)


def by_types(estimate: Estimator, rewards: Tensor, size: int, mu: Tensor = POLICY, source: Tensor = SOURCE) -> Tensor:
    """As :func:`expectations` at m = 0, of many samples: how often each generation occurs is all that matters."""
    kinds = len(rewards)
    others = torch.tensor(list(itertools.combinations_with_replacement(range(kinds), size - 1)))
    counts = torch.nn.functional.one_hot(others, kinds).sum(dim=1).double()
    log_probability = math.lgamma(size) - torch.lgamma(counts + 1).sum(dim=-1) + (counts * mu.log()).sum(dim=-1)
    weight, found = source / mu, []
    for y in range(kinds):
        draws = torch.cat([torch.full_like(others[:, :1], y), others], dim=-1)
        found.append((estimate(rewards[draws], weight[draws])[:, 0] * log_probability.exp()).sum())
    return torch.stack(found)


def tilt(n: int, normalised: bool = False) -> Estimator:
    return lambda rewards, weights: pooled_tilt(rewards, weights, n, normalised)


def log_quantile(normalised: bool) -> Estimator:
    return lambda rewards, weights: harmonic_log_quantile(rewards, weights, normalised)


def exact_tilt(rewards: Tensor, n: int) -> Tensor:
    return log_bon_ratio(*level_probabilities(SOURCE, rewards), n).exp()


def exact_series(rewards: Tensor, k: int, source: Tensor = SOURCE) -> Tensor:
    """-sum_{j<=k} (1 - F)^j / j with F half-way between p_< and p_<=."""
    low, high = level_probabilities(source, rewards)
    return -sum((1 - (low + high) / 2) ** j / j for j in range(1, k + 1))


@REWARDS
@pytest.mark.parametrize(("n", "size"), [(2, 2), (2, 5), (3, 3), (3, 6), (4, 4), (4, 6)])
def test_tilt_is_unbiased(rewards: Tensor, n: int, size: int) -> None:
    close(expectations(tilt(n), rewards, size), exact_tilt(rewards, n))
    # whichever sample of the prompt, and whichever distribution the samples are from
    close(expectations(tilt(n), rewards, size, own=size - 1, mu=BEHAVIOUR), exact_tilt(rewards, n))
    for normalised in (True, False):
        close(expectations(tilt(n, normalised), rewards, size, mu=SOURCE), exact_tilt(rewards, n))


@REWARDS
@pytest.mark.parametrize("size", [2, 3, 6])
def test_log_quantile_has_the_taylor_series_for_its_expectation(rewards: Tensor, size: int) -> None:
    wanted = exact_series(rewards, size - 1)
    close(expectations(log_quantile(normalised=False), rewards, size), wanted)
    close(expectations(log_quantile(normalised=False), rewards, size, own=size - 1, mu=BEHAVIOUR), wanted)
    # samples of the source itself: their weights are one
    close(expectations(log_quantile(normalised=True), rewards, size, mu=SOURCE), wanted)


def test_the_series_comes_near_the_log_with_many_samples() -> None:
    law, rewards = f64([0.3, 0.7]), f64([0.0, 1.0])
    for size, tolerance in ((2, 1.1), (4, 0.6), (16, 0.05)):
        found = by_types(log_quantile(normalised=False), rewards, size, law, law)
        assert found.tolist() == pytest.approx([math.log(0.15), math.log(0.65)], abs=tolerance)


@REWARDS
@pytest.mark.parametrize("of_mu", [True, False], ids=["of mu", "of the source"])
def test_a_mixture_of_fixed_numbers_has_a_bias_of_one_over_s(rewards: Tensor, of_mu: bool) -> None:
    """With n samples of mu and m of the source, what is exact and what is not.

    Exact: means of ``a * f`` over all samples (another test). Not exact: the others of a sample of mu are n - 1 and
    m, not n and m. So for N = 2 E[g_i | y_i] - g = 2 (F - E_own[a 1[below]]) / (S - 1), where ties count half and
    the own distribution is that of sample i. At equal shares that is as 1 / (S - 1), and for N = 3 nearly so. The
    quantile's bias does that only for generations well above the lowest. None of it where the source is mu.
    """
    law = BEHAVIOUR if of_mu else SOURCE
    below = (rewards < rewards.unsqueeze(-1)).double() + 0.5 * (rewards == rewards.unsqueeze(-1)).double()
    biases: dict[str, list[Tensor]] = {"2": [], "3": [], "log": []}
    for half in (2, 4):
        size = 2 * half
        own = 0 if of_mu else size - 1
        mixed = partial(expectations, rewards=rewards, n=half, m=half, own=own, mu=BEHAVIOUR)
        biases["2"].append(mixed(tilt(2)) - exact_tilt(rewards, 2))
        close(biases["2"][-1], 2 * (below @ SOURCE - below @ (law * weights_of(1, 1, BEHAVIOUR))) / (size - 1))
        biases["3"].append(mixed(tilt(3)) - exact_tilt(rewards, 3))
        biases["log"].append(mixed(log_quantile(normalised=False)) - exact_series(rewards, size - 1))
    small, large = biases["3"]
    assert (small.abs() > 1e-3).all() and ((large / small).sub(3 / 7).abs() < 0.01).all()
    small, large = biases["log"]
    assert (small.abs() > 0.01).all() and (large.abs() < 0.9 * small.abs()).all()
    assert large[2] / small[2] == pytest.approx(0.5, abs=0.1)
    for estimate, wanted in ((tilt(3), exact_tilt(rewards, 3)), (log_quantile(False), exact_series(rewards, 3))):
        close(expectations(estimate, rewards, 2, 2, 0 if of_mu else 3, SOURCE), wanted)


@REWARDS
def test_bias_of_the_normalised_forms(rewards: Tensor) -> None:
    """The figures are those of the docstrings (strict order). The quantile's falls late at the lowest level."""
    for n, figures in ((2, [0.053, 0.025, 0.012]), (3, [0.176, 0.098, 0.050])):
        biases = [by_types(tilt(n, True), rewards, size) - exact_tilt(rewards, n) for size in (4, 8, 16)]
        assert all((now.abs() < 0.62 * then.abs()).all() for then, now in itertools.pairwise(biases[-2:]))
        largest = [bias.abs().max().item() for bias in biases]
        assert all(0.4 < now / then < 0.6 for then, now in itertools.pairwise(largest))
        if rewards is STRICT:
            assert largest == pytest.approx(figures, abs=5e-4)
    biases = [by_types(log_quantile(True), rewards, size) - exact_series(rewards, size - 1) for size in (8, 16, 32)]
    best = [bias[2].item() for bias in biases]
    assert all(0.4 < now / then < 0.65 for then, now in itertools.pairwise(best))
    if rewards is STRICT:
        assert best == pytest.approx([-0.019, -0.009, -0.005], abs=5e-4)
        assert [bias[1].item() for bias in biases] == pytest.approx([0.131, 0.151, 0.122], abs=5e-4)


def test_bias_of_the_normalised_quantile_at_the_lowest_level_falls_in_the_end() -> None:
    """Two generations of which the source draws the lower with probability 0.2, the policy with 0.3."""
    policy, source, rewards = f64([0.3, 0.7]), f64([0.2, 0.8]), f64([0.0, 1.0])
    biases = [
        by_types(log_quantile(True), rewards, size, policy, source) - exact_series(rewards, size - 1, source)
        for size in (16, 32, 64)
    ]
    assert [bias[0].item() for bias in biases] == pytest.approx([0.126, 0.097, 0.055], abs=5e-4)
    assert [bias[1].item() for bias in biases] == pytest.approx([0.0072, 0.0035, 0.0017], abs=5e-5)


# --- gradients ------------------------------------------------------------------------------------------------------

SCORE = torch.eye(3, dtype=torch.float64) - POLICY  # grad log pi(y) by the logits, one row a generation


def mean_gradient(coefficients: Estimator, rewards: Tensor, n: int, m: int = 0, mu: Tensor = POLICY) -> Tensor:
    """E[sum_i coefficient_i grad log pi(y_i) / S] over all draws; called with rewards and generations, [R, S]."""
    draws, probability = all_draws([mu] * n + [SOURCE] * m)
    each = (coefficients(rewards[draws], draws).unsqueeze(-1) * SCORE[draws]).mean(dim=1)
    return (probability.unsqueeze(-1) * each).sum(dim=0)


def forward_coefficients(big_n: int, n: int, mu: Tensor) -> Estimator:
    def coefficients(rewards: Tensor, draws: Tensor) -> Tensor:
        a, p = mixture_weights((POLICY / mu).log()[draws], (SOURCE / mu).log()[draws], n)
        return a * pooled_tilt(rewards, a, big_n) - p

    return coefficients


def forward_gradient(rewards: Tensor, big_n: int) -> Tensor:
    """The gradient of KL(pi_BoN || pi) by the logits of the policy."""
    logits = POLICY.log().requires_grad_()
    log_bon = bon_log_probs(SOURCE.log(), rewards, big_n)
    kl = (log_bon.exp() * (log_bon - logits.log_softmax(dim=-1))).sum()
    return torch.autograd.grad(kl, logits)[0]


@REWARDS
@pytest.mark.parametrize(("big_n", "size"), [(2, 2), (2, 4), (3, 3), (3, 5)])
@pytest.mark.parametrize("mu", [POLICY, BEHAVIOUR], ids=["on policy", "off policy"])
def test_forward_gradient_is_exact(rewards: Tensor, big_n: int, size: int, mu: Tensor) -> None:
    wanted = -forward_gradient(rewards, big_n)
    assert wanted.abs().max() > 0.03
    close(mean_gradient(forward_coefficients(big_n, size, mu), rewards, size, mu=mu), wanted)


@REWARDS
def test_forward_gradient_of_a_mixture_is_off_by_one_over_s(rewards: Tensor) -> None:
    wanted = -forward_gradient(rewards, 2)
    errors = []
    for half in (1, 2, 4):
        found = mean_gradient(forward_coefficients(2, half, BEHAVIOUR), rewards, half, half, BEHAVIOUR)
        errors.append((found - wanted) * (2 * half - 1))
    assert 1e-3 < errors[0].abs().max() < 0.1
    for error in errors[1:]:
        close(error, errors[0])


@REWARDS
@pytest.mark.parametrize("size", [2, 3, 5])
def test_only_a_constant_may_be_subtracted_from_ranks(rewards: Tensor, size: int) -> None:
    """The leave-one-out mean changes the gradient of the rank part; of what a sample has by itself it is right."""
    for source in (POLICY, SOURCE):
        weight = source / POLICY
        ranks = lambda rewards, draws, weight=weight: harmonic_log_quantile(rewards, weight[draws])  # noqa: E731
        plain = mean_gradient(ranks, rewards, size)
        close(plain, (POLICY * exact_series(rewards, size - 1, source)) @ SCORE)
        centred = mean_gradient(lambda r, d, f=ranks: f(r, d) - leave_one_out_mean(f(r, d), dim=-1), rewards, size)
        assert (centred - plain).abs().max() > 0.02
        close(mean_gradient(lambda r, d, f=ranks: f(r, d) + 0.7, rewards, size), plain)
    own = lambda rewards, draws: -weight.log()[draws]  # noqa: E731
    centred = mean_gradient(lambda r, d: own(r, d) - leave_one_out_mean(own(r, d), dim=-1), rewards, size)
    close(centred, mean_gradient(own, rewards, size))


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(4, 0), (3, 1), (1, 5)])
def test_weights_carry_expectations_over_to_the_source_and_to_the_policy(n: int, m: int) -> None:
    generations = torch.arange(3).repeat(n + m).reshape(3, -1)
    a, p = mixture_weights((POLICY / BEHAVIOUR).log()[generations], (SOURCE / BEHAVIOUR).log()[generations], n)
    close(a, weights_of(n, m, BEHAVIOUR)[generations])
    mixture = (n * BEHAVIOUR + m * SOURCE) / (n + m)
    flat = generations.flatten()
    for weight, law in ((a, SOURCE), (p, POLICY)):
        by_generation = torch.zeros(3).double().scatter(0, flat, weight.flatten())
        close(mixture * by_generation, law)


def test_weights_of_the_policys_own_samples() -> None:
    ratio = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, p = mixture_weights(torch.zeros_like(ratio), ratio, 4)
    assert torch.equal(a, ratio.exp()) and torch.equal(p, torch.ones_like(ratio))


@given(st.lists(st.floats(-2000, 2000), min_size=2, max_size=8), st.integers(1, 7))
@examples(60)
def test_weights_of_a_mixture_are_bounded_by_it(ratios: list[float], n: int) -> None:
    source, size = f64([ratios]), len(ratios)
    n = min(n, size - 1)
    a, p = mixture_weights(torch.zeros_like(source), source, n)
    assert (a <= size / (size - n) * (1 + 1e-12)).all() and (p <= size / n * (1 + 1e-12)).all()
    # q = (n mu + m source) / S: the shares of both sum to one
    close((n * p + (size - n) * a) / size, torch.ones_like(a))
    nothing, whole = mixture_weights(torch.zeros(1, size), torch.full((1, size), -math.inf), n)
    assert nothing.eq(0).all()
    close(whole, torch.full_like(whole, size / n))


@given(st.lists(st.floats(-300, 300), min_size=1, max_size=9), st.floats(-300, 300))
@examples(60)
def test_effective_sample_size_is_a_share(logs: list[float], scale: float) -> None:
    size = len(logs)
    found = effective_sample_size(f64([logs, [scale] * size, [scale] + [-math.inf] * (size - 1)]).exp())
    assert 1 / size - 1e-12 <= found[0] <= 1 + 1e-12
    assert found[1:].tolist() == pytest.approx([1.0, 1 / size], abs=1e-12)


def test_effective_sample_size_by_hand() -> None:
    found = effective_sample_size(f64([[1.0, 2.0, 3.0, 0.0], [0.0] * 4]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([36 / 14 / 4, 0.0], abs=1e-15)


# --- size, devices, and what is refused -----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("call", "factor"),
    [
        (lambda r, a: mixture_weights(-a, a, 3)[0], 1),
        (lambda r, a: pooled_tilt(r, a, 2), 3),
        (lambda r, a: pooled_tilt(r, a, 4, True), 5),
        (lambda r, a: effective_sample_size(a), 1),
    ],
    ids=["mixture_weights", "tilt 2", "tilt 4", "effective_sample_size"],
)
def test_memory_is_linear_in_samples(call: Estimator, factor: int) -> None:
    rewards, weights = torch.rand(2, 2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Largest() as largest:
        call(rewards, weights)
    assert largest.entries >= 999 and largest.entries <= factor * 1001


def test_a_million_samples() -> None:
    rewards = torch.rand(20_000, 64, generator=torch.Generator().manual_seed(0))
    found = pooled_tilt(rewards, torch.ones_like(rewards), 2)
    assert found.shape == rewards.shape
    assert found.mean().item() == pytest.approx(1.0, abs=1e-9)  # of two, one is the best


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_made_on_a_device_that_nobody_named(device: str) -> None:
    rewards, weights = torch.randint(4, (3, 6), device=device), torch.rand(3, 6, device=device)
    with torch.device("meta"):
        found = [
            *mixture_weights(weights, -weights, 4),
            pooled_tilt(rewards, weights, 3),
            pooled_tilt(rewards, weights, 3, normalised=True),
            harmonic_log_quantile(rewards, weights),
            harmonic_log_quantile(rewards, weights, normalised=True),
            effective_sample_size(weights.double()),
        ]
    assert {value.device.type for value in found} == {device}
    assert {value.dtype for value in found} == {torch.float64}
    assert all(value.isfinite().all() for value in found)


ZERO, NAN = torch.zeros(2, 3), torch.full((2, 3), math.nan)


@pytest.mark.parametrize(("policy", "source"), [(NAN, ZERO), (ZERO, NAN), (ZERO, ZERO + 710), (ZERO + 710, ZERO)])
def test_weights_beyond_all_numbers_are_refused(policy: Tensor, source: Tensor) -> None:
    with pytest.raises(ValueError, match="not a number, or beyond float64"):
        mixture_weights(policy, source, 3)
