"""The Best-of-N mathematics against enumeration, exact rational numbers and decimals of up to 900 digits.

Nothing here repeats the formulas of the package in floating point: finite distributions are enumerated draw by
draw in fractions, and where a logarithm is needed it is taken of the exact number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from enumerated import bon_log_probs, examples, f64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bond_plugin.algorithms.jbond import crude_log_quantile
from bond_plugin.bestofn.baselines import centre, leave_one_out_mean
from bond_plugin.bestofn.distribution import level_probabilities, log_bon_ratio, quantiles
from bond_plugin.bestofn.estimates import expected_max
from bond_plugin.bestofn.selectors import random_argmax

EPS = 2.0**-52


def digits(count: int) -> Context:
    return Context(prec=count, Emin=MIN_EMIN, Emax=MAX_EMAX)


def as_decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def log_of(value: Fraction) -> float:
    """The logarithm of a fraction, correct to float64 also where its terms have thousands of digits."""
    with localcontext(digits(60)):
        return float(as_decimal(value).ln()) if value else -math.inf


# --- finite distributions -------------------------------------------------------------------------------------------

Finite = tuple[list[Fraction], list[float]]


@st.composite
def finite_distributions(draw: st.DrawFn, size: int = 6, ties: bool = True, zeros: bool = True) -> Finite:
    """Masses that sum to one, and rewards of few levels, or of one level a point."""
    count = draw(st.integers(1, size))
    masses = draw(st.lists(st.integers(0 if zeros else 1, 9), min_size=count, max_size=count).filter(any))
    if ties:
        rewards = draw(st.lists(st.integers(-2, 1), min_size=count, max_size=count))
    else:
        rewards = draw(st.permutations(range(count)))
    return [Fraction(mass, sum(masses)) for mass in masses], [float(reward) for reward in rewards]


def tensors(distribution: Finite) -> tuple[Tensor, Tensor]:
    masses, rewards = distribution
    return f64([log_of(mass) for mass in masses]), f64(rewards)


def cdf(distribution: Finite) -> tuple[list[Fraction], list[Fraction]]:
    """p_< and p_<= of each point."""
    masses, rewards = distribution
    return (
        [sum((m for m, r in zip(masses, rewards, strict=True) if r < mine), Fraction()) for mine in rewards],
        [sum((m for m, r in zip(masses, rewards, strict=True) if r <= mine), Fraction()) for mine in rewards],
    )


def best_of_n_by_enumeration(distribution: Finite, n: int) -> list[Fraction]:
    """All S^n draws; the winner is one of the best draws, each with the same probability."""
    masses, rewards = distribution
    found = [Fraction()] * len(masses)
    for draws in itertools.product(range(len(masses)), repeat=n):
        best = max(rewards[i] for i in draws)
        winners = [i for i in draws if rewards[i] == best]
        for i in winners:
            found[i] += math.prod(masses[j] for j in draws) / len(winners)
    return found


def best_of_n_by_levels(distribution: Finite, n: int) -> list[Fraction]:
    """The closed form, in fractions."""
    return [
        mass * (high**n - low**n) / (high - low) if mass else Fraction()
        for mass, low, high in zip(distribution[0], *cdf(distribution), strict=True)
    ]


@given(finite_distributions(size=4), st.integers(1, 4))
@examples(60)
def test_best_of_n_is_what_enumeration_of_all_draws_gives(distribution: Finite, n: int) -> None:
    wanted = best_of_n_by_enumeration(distribution, n)
    assert wanted == best_of_n_by_levels(distribution, n)
    assert sum(wanted) == 1
    found = bon_log_probs(*tensors(distribution), n)
    assert found.exp().tolist() == pytest.approx([float(p) for p in wanted], abs=1e-14)
    assert found.tolist() == pytest.approx([log_of(p) for p in wanted], abs=1e-12)


@given(finite_distributions(), st.sampled_from([1, 2, 3, 7, 64, 1000, 10_000]))
@examples(60)
def test_best_of_n_sums_to_one_and_has_no_mass_where_the_reference_has_none(distribution: Finite, n: int) -> None:
    log_ref, rewards = tensors(distribution)
    found = bon_log_probs(log_ref, rewards, n)
    assert found.dtype == torch.float64
    assert found.exp().sum().item() == pytest.approx(1.0, abs=4 * EPS * (n + 10))
    assert torch.equal(found == -math.inf, log_ref == -math.inf)
    wanted = [log_of(p) for p in best_of_n_by_levels(distribution, n)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-13, abs=4 * EPS * (n + 10))


@given(finite_distributions())
@examples(40)
def test_level_probabilities_are_sums_over_lower_and_over_no_higher_rewards(distribution: Finite) -> None:
    masses, rewards = distribution
    p_lt, p_le = level_probabilities(f64([float(m) for m in masses]), f64(rewards))
    low, high = cdf(distribution)
    assert p_lt.tolist() == pytest.approx([float(p) for p in low], abs=4 * EPS)
    assert p_le.tolist() == pytest.approx([float(p) for p in high], abs=4 * EPS)


def test_rounding_does_not_carry_a_probability_above_one() -> None:
    shares = torch.full((57,), 1 / 57, dtype=torch.float64)
    assert sum(shares.tolist()) > 1
    assert level_probabilities(shares, torch.arange(57.0))[1].max() == 1


@pytest.mark.parametrize("n", [2, 5])
def test_best_of_n_is_what_drawing_gives(n: int) -> None:
    distribution = [Fraction(m, 16) for m in (1, 4, 2, 0, 6, 3)], [1.0, 0.0, 1.0, 2.0, 0.0, 2.0]
    log_ref, rewards = tensors(distribution)
    generator, rows = torch.Generator().manual_seed(n), 100_000
    draws = torch.multinomial(log_ref.exp(), rows * n, replacement=True, generator=generator).reshape(rows, n)
    winners = draws.gather(1, random_argmax(rewards[draws], generator))[:, 0]
    shares = torch.bincount(winners, minlength=len(rewards)).double() / rows
    wanted = bon_log_probs(log_ref, rewards, n).exp()
    assert shares[3] == wanted[3] == 0
    assert ((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / rows).sqrt()).all()


@given(finite_distributions(), st.integers(1, 40))
@examples(60)
def test_the_theorem_with_its_sum_written_out_is_the_closed_form(distribution: Finite, n: int) -> None:
    """Theorem 1 holds for tied rewards as it stands: term (B) is the whole difference to p_<=^(N-1)."""
    p_lt, p_le = cdf(distribution)
    points = [(low, high) for low, high in zip(p_lt, p_le, strict=True) if high]
    theorem = [high ** (n - 1) * sum((low / high) ** (i - 1) for i in range(1, n + 1)) for low, high in points]
    closed = [(high**n - low**n) / (high - low) if high > low else n * high ** (n - 1) for low, high in points]
    assert theorem == closed
    low, high = (f64([float(p) for p in column]) for column in zip(*points, strict=True))
    assert log_bon_ratio(low, high, n).tolist() == pytest.approx([log_of(p) for p in theorem], abs=1e-12)


def test_best_of_n_keeps_leading_dimensions_and_each_row_is_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randint(3, (2, 3, 5), generator=generator).double()
    for function, shape in (
        (lambda log_ref, rewards: bon_log_probs(log_ref, rewards, 4), (2, 3, 5)),
        (lambda log_ref, rewards: level_probabilities(log_ref.exp(), rewards)[0], (2, 3, 5)),
    ):
        together = function(log_ref, rewards)
        assert together.shape == shape
        for i, j in itertools.product(range(2), range(3)):
            torch.testing.assert_close(together[i, j], function(log_ref[i, j], rewards[i, j]), rtol=1e-13, atol=1e-13)


def test_a_response_whose_probability_underflows_gets_its_ratio_too() -> None:
    """e^-800 is 0 in float64, but log pi_ref = -800 is what a language model says of a whole response."""
    found = bon_log_probs(f64(math.log(0.25), math.log(0.75), -800.0, -800.0), f64(0.0, 1.0, 0.5, 2.0), 8)
    assert found[2:].tolist() == pytest.approx([-800 + 7 * math.log(0.25) + math.log(8), -800 + math.log(8)])


# --- the ratio, in float64 and in many digits -----------------------------------------------------------------------


def exact_log_ratio(p_lt: float, p_le: float, n: int) -> Decimal:
    low, high = Decimal(p_lt), Decimal(p_le)
    with localcontext(digits(120)):
        return ((high**n - low**n) / (high - low) if high > low else n * high ** (n - 1)).ln()


def allowed_error(p_le: float, n: int) -> float:
    """A few units of float64 of each of the two summands that the logarithm consists of."""
    return 8 * EPS * (1 + n * abs(math.log(p_le)) + math.log(n))


probabilities = st.one_of(
    st.floats(1e-9, 1.0),
    st.floats(-300, 0).map(lambda power: 10.0**power),
    st.floats(-15, -1).map(lambda power: 1 - 10.0**power),
    st.just(1.0),
)
# The gap relative to p_<=: none, all of it, a few units in the last place, or anything between.
gaps = st.one_of(
    st.sampled_from([0.0, 1.0, 1e-15, 3e-15, 1e-12]),
    st.floats(0.0, 1.0),
    st.floats(-15, 0).map(lambda power: 10.0**power),
)
many = st.one_of(st.integers(1, 50), st.integers(1, 10_000), st.sampled_from([1, 2, 9_999, 10_000]))


@given(probabilities, gaps, many)
@examples(250)
def test_log_ratio_is_accurate_to_float64_everywhere(p_le: float, gap: float, n: int) -> None:
    p_lt = max(0.0, p_le - p_le * gap)
    found = log_bon_ratio(f64([p_lt]), f64([p_le]), n).item()
    assert abs(Decimal(found) - exact_log_ratio(p_lt, p_le, n)) <= allowed_error(p_le, n)


@pytest.mark.parametrize("n", [2, 100, 10_000])
@pytest.mark.parametrize(
    ("p_lt", "p_le"),
    [
        (1 - 1e-15, 1.0),
        (0.5 - 1e-15, 0.5),
        (1e-15, 2e-15),
        (0.0, 1e-15),
        (0.0, 1e-300),
        (1e-300, 0.5),
        (0.3, 0.7),
        (0.99998, 0.99999),
    ],
)
def test_log_ratio_at_the_edges_and_term_by_term(p_lt: float, p_le: float, n: int) -> None:
    found = log_bon_ratio(f64([p_lt]), f64([p_le]), n).item()
    low, high = Decimal(p_lt), Decimal(p_le)
    with localcontext(digits(60)):
        q = low / high
        series, term = Decimal(0), Decimal(1)
        for _ in range(n):
            series, term = series + term, term * q
        wanted = (high ** (n - 1) * series).ln()
        assert abs(wanted - exact_log_ratio(p_lt, p_le, n)) < Decimal("1e-30")
    assert abs(Decimal(found) - wanted) <= allowed_error(p_le, n)


def test_best_of_one_is_the_reference() -> None:
    p_le = f64(0.0, 1e-300, 1e-9, 0.3, 1.0)
    for low in (torch.zeros(5).double(), p_le / 2, p_le):
        assert log_bon_ratio(low, p_le, 1).abs().max() <= EPS
    log_ref, rewards = tensors(([Fraction(1, 4), Fraction(3, 4), Fraction()], [1.0, 0.0, 2.0]))
    torch.testing.assert_close(bon_log_probs(log_ref, rewards, 1), log_ref)


@given(probabilities, many)
@examples(60)
def test_ratio_at_a_point_without_mass_and_at_the_lowest_level(p: float, n: int) -> None:
    """p_< = p_<= is the density of a continuous reward, n p^(n-1); p_< = 0 leaves p^(n-1)."""
    equal, lowest = log_bon_ratio(f64([p]), f64([p]), n), log_bon_ratio(f64([0.0]), f64([p]), n)
    wanted = (n - 1) * math.log(p)
    assert equal.item() == pytest.approx(wanted + math.log(n), abs=allowed_error(p, n))
    assert lowest.item() == pytest.approx(wanted, abs=allowed_error(p, n))


def test_ratio_is_minus_infinity_below_everything() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert log_bon_ratio(zero, zero, 1).item() == 0
    for n in (2, 10_000):
        assert log_bon_ratio(zero, zero, n).item() == -math.inf


def test_infinite_n_leaves_the_best_level_in_the_proportions_of_the_reference() -> None:
    masses = [Fraction(1, 10), Fraction(2, 10), Fraction(3, 10), Fraction(4, 10), Fraction()]
    log_ref, rewards = tensors((masses, [3.0, 0.0, 3.0, 1.0, 9.0]))
    shares = [bon_log_probs(log_ref, rewards, n).exp() for n in (1, 4, 16, 64, 256, 10_000, 10**9)]
    best = [share[[0, 2]].sum().item() for share in shares]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(best))
    for share in shares[-3:]:
        assert share.tolist() == pytest.approx([0.25, 0.0, 0.75, 0.0, 0.0], abs=1e-6)
    # The ratio there tends to one over the level's mass.
    assert log_bon_ratio(f64([0.6]), f64([1.0]), 10**9).item() == pytest.approx(-math.log(0.4), abs=1e-14)


# --- quantiles from samples -----------------------------------------------------------------------------------------

few_levels = st.integers(-2, 2).map(float)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.booleans())
@examples(60)
def test_quantiles_count(data: st.DataObject, batch: int, m: int, k: int, include_self: bool) -> None:
    rewards = [[data.draw(few_levels) for _ in range(m)] for _ in range(batch)]
    samples = [[data.draw(few_levels) for _ in range(k)] for _ in range(batch)]
    p_lt, p_le = quantiles(f64(rewards), f64(samples), include_self)
    assert p_lt.shape == p_le.shape == (batch, m)
    for row, column in itertools.product(range(batch), range(m)):
        mine = rewards[row][column]
        pool = samples[row] + [mine] * include_self
        assert p_lt[row, column].item() == sum(other < mine for other in pool) / len(pool)
        assert p_le[row, column].item() == sum(other <= mine for other in pool) / len(pool)


def test_quantiles_of_extreme_rewards_and_of_an_empty_batch() -> None:
    samples = f64([[0.0, 1.0, -math.inf, math.inf]])
    p_lt, p_le = quantiles(f64([[-math.inf, -0.0, 0.5, math.inf]]), samples)
    assert p_lt.tolist() == [[0.0, 0.25, 0.5, 0.75]]
    assert p_le.tolist() == [[0.25, 0.5, 0.5, 1.0]]
    assert quantiles(torch.zeros(0, 2), torch.zeros(0, 3))[1].shape == (0, 2)


def test_counting_itself_keeps_the_log_of_the_quantile_finite() -> None:
    below_all = torch.tensor([[-5.0]])
    samples = torch.tensor([[1.0, 2.0, 3.0]])
    assert quantiles(below_all, samples)[1].item() == 0
    p_lt, p_le = quantiles(below_all, samples, include_self=True)
    assert (p_lt.item(), p_le.item()) == (0.0, 0.25)
    assert log_bon_ratio(p_lt, p_le, 4).isfinite().all()


@given(st.data(), st.sampled_from([2, 4, 8]))
@examples(40)
def test_nothing_but_the_order_of_rewards_counts(data: st.DataObject, n: int) -> None:
    """Any strictly increasing transformation: a table of sorted values, drawn anew each time."""
    levels = 9
    table = data.draw(
        st.lists(st.floats(-1e6, 1e6), min_size=levels, max_size=levels, unique=True).map(lambda v: f64(sorted(v)))
    )
    before = torch.tensor(data.draw(st.lists(st.integers(0, levels - 1), min_size=12, max_size=12)))
    transformations: list[Callable[[Tensor], Tensor]] = [
        lambda index: table[index],
        lambda index: index.double().exp(),
        lambda index: 3.0 * index.double() - 100.0,
    ]
    log_ref = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)

    def everything(rewards: Tensor) -> list[Tensor]:
        ours, theirs = rewards[:4].reshape(2, 2), rewards[4:].reshape(2, 4)
        found = []
        for include_self in (False, True):
            p_lt, p_le = quantiles(ours, theirs, include_self)
            found += [p_lt, p_le, log_bon_ratio(p_lt, p_le, n)]
        found += [crude_log_quantile(ours, theirs, ties) for ties in ("expected", "textbook")]
        found += [random_argmax(theirs, torch.Generator().manual_seed(3)), bon_log_probs(log_ref, rewards, n)]
        return found

    wanted = everything(before.double())
    for transform in transformations:
        for now, then in zip(everything(transform(before)), wanted, strict=True):
            assert torch.equal(now, then)


# --- BOND -----------------------------------------------------------------------------------------------------------


def objective(log_pi: Tensor, log_ref: Tensor, reward: Tensor, n: int) -> Tensor:
    """E[r] - KL(pi || pi_ref) / (n - 1)."""
    pi = log_pi.exp()
    return (pi * reward).sum() - (pi * (log_pi - log_ref)).sum() / (n - 1)


def optimum(log_ref: Tensor, reward: Tensor, n: int) -> Tensor:
    """What maximises the objective: pi_ref exp((n - 1) r), normalised."""
    return (log_ref + (n - 1) * reward).log_softmax(-1)


@given(finite_distributions(zeros=False), st.sampled_from([2, 3, 8, 100]), st.integers(0, 10**6))
@examples(60)
def test_optimum_of_bonds_reward_is_best_of_n_with_and_without_ties(distribution: Finite, n: int, seed: int) -> None:
    log_ref, rewards = tensors(distribution)
    reward = log_bon_ratio(*level_probabilities(log_ref.exp(), rewards), n) / (n - 1)
    log_bon = f64([log_of(p) for p in best_of_n_by_levels(distribution, n)])
    torch.testing.assert_close(log_ref + (n - 1) * reward, log_bon, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(optimum(log_ref, reward, n), log_bon, rtol=1e-12, atol=1e-11)
    # Of any policy the objective is -KL(pi || pi_BoN) / (n - 1): at most 0, and 0 for Best-of-N alone.
    other = torch.randn(len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_pi = other.log_softmax(-1)
    backward = (log_pi.exp() * (log_pi - log_bon)).sum().item()
    assert objective(log_pi, log_ref, reward, n).item() == pytest.approx(-backward / (n - 1), rel=1e-9, abs=1e-11)
    assert objective(log_bon, log_ref, reward, n).item() == pytest.approx(0.0, abs=1e-11)


def test_without_the_correction_the_optimum_is_another_distribution_where_rewards_tie() -> None:
    log_ref = f64([math.log(0.1)] * 10)
    tied = f64([0.0] * 6 + [1.0] * 4)
    n = 4

    def miss(log_ref: Tensor, rewards: Tensor) -> float:
        reward = level_probabilities(log_ref.exp(), rewards)[1].log()
        log_pi, log_bon = optimum(log_ref, reward, n), bon_log_probs(log_ref, rewards, n)
        return (log_bon.exp() * (log_bon - log_pi)).sum().item()

    # By hand: P(level 1) is 1 - 0.6^4 under Best-of-4, but 0.4 / (0.4 + 0.6^4) where term (B) is left out.
    right, found = 1 - 0.6**4, 0.4 / (0.4 + 0.6**4)
    wanted = right * math.log(right / found) + (1 - right) * math.log((1 - right) / (1 - found))
    assert miss(log_ref, tied) == pytest.approx(wanted, abs=1e-12)
    assert wanted > 0.03
    # Without ties it vanishes with the mass of the single generation.
    fine = torch.full((2000,), -math.log(2000), dtype=torch.float64)
    assert miss(fine, torch.arange(2000.0)) < 1e-5


# --- vBoN -----------------------------------------------------------------------------------------------------------


def vbon_reward(f: Tensor, log_ref: Tensor, n: int) -> Tensor:
    """As `--vbon.bound exact` has it: Best-of-N of y's own mass above F, over n - 1."""
    return log_bon_ratio(f, f + log_ref.exp(), n) / (n - 1)


def exact_vbon(f: float, log_ref: float, n: int) -> Decimal:
    """In as many digits as it takes: next to F = 1 a mass of e^-2000 stands in digit 869."""
    with localcontext(digits(60 + int(-log_ref / math.log(10)))):
        low, ref = Decimal(f), Decimal(log_ref).exp()
        if n <= 8:  # the definition
            total = ref**n + sum(math.comb(n, i) * low ** (n - i) * ref**i for i in range(1, n))
        else:
            total = (low + ref) ** n - low**n
        return (total.ln() - Decimal(log_ref)) / (n - 1)


@pytest.mark.parametrize("n", [2, 3, 8, 10_000])
@pytest.mark.parametrize("log_ref", [-2000.0, -745.2, -69.3, -38.7, -30.1, -29.9, -7.0, -0.9])
@pytest.mark.parametrize("f", [1e-6, 1 / 65, 0.05, 0.577, 1 - 1e-12, 1.0])
def test_exact_reward_of_vbon_in_many_digits(f: float, log_ref: float, n: int) -> None:
    """F is never 0, and as an estimate may be above 1 - pi_ref."""
    found = vbon_reward(f64([f]), f64([log_ref]), n).item()
    wanted = exact_vbon(f, log_ref, n)
    assert abs(Decimal(found) - wanted) <= Decimal("1e-13") * (1 + abs(wanted))


@given(finite_distributions(ties=False, zeros=False), st.sampled_from([2, 3, 8, 64]), st.integers(0, 10**6))
@examples(60)
def test_optimum_of_vbons_exact_reward_is_best_of_n(distribution: Finite, n: int, seed: int) -> None:
    log_ref, rewards = tensors(distribution)
    reward = vbon_reward(f64([float(p) for p in cdf(distribution)[0]]), log_ref, n)
    log_bon = f64([log_of(p) for p in best_of_n_by_levels(distribution, n)])
    torch.testing.assert_close(log_ref + (n - 1) * reward, log_bon, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(optimum(log_ref, reward, n), log_bon, rtol=1e-11, atol=1e-11)
    log_pi = torch.randn(
        len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log_softmax(-1)
    backward = (log_pi.exp() * (log_pi - log_bon)).sum().item()
    assert objective(log_pi, log_ref, reward, n).item() == pytest.approx(-backward / (n - 1), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_scaled_by_n_as_in_the_authors_code_the_optimum_is_another_distribution(n: int) -> None:
    masses, rewards = [Fraction(m, 10) for m in (1, 2, 3, 4)], [2.0, 0.0, 1.0, 3.0]
    log_ref = tensors((masses, rewards))[0]
    ours = vbon_reward(f64([float(p) for p in cdf((masses, rewards))[0]]), log_ref, n)
    theirs = ours * (n - 1) / n
    log_bon = bon_log_probs(log_ref, f64(rewards), n)
    torch.testing.assert_close(optimum(log_ref, ours, n), log_bon, rtol=1e-12, atol=1e-12)
    log_pi = optimum(log_ref, theirs, n)
    assert (log_bon.exp() * (log_bon - log_pi)).sum().item() > 1e-3
    assert (log_bon - log_pi).abs().max() > 0.3
    # It is off in a known way: log pi_BoN is mixed with 1/n of log pi_ref.
    torch.testing.assert_close(log_pi, ((n - 1) / n * log_bon + log_ref / n).log_softmax(-1), rtol=1e-11, atol=1e-11)


def test_the_exact_reward_of_vbon_is_above_its_lower_bound_log_f_but_for_a_constant() -> None:
    """L1 keeps the first of the sum's n positive terms, n F^(n-1) pi_ref."""
    log_f = torch.linspace(-30, 0, 31, dtype=torch.float64)
    exact = vbon_reward(log_f.exp(), torch.full_like(log_f, -40.0), 6) - math.log(6) / 5
    assert (exact >= log_f - 1e-13).all()
    torch.testing.assert_close(exact[15:], log_f[15:], rtol=0, atol=1e-9)


# --- J-BOND ---------------------------------------------------------------------------------------------------------


def over_all_orders(mine: float, anchors: Sequence[float]) -> float:
    """The mean of Eq. 17 over every order of the m + 1 samples in which equals may be put."""
    orders = list(itertools.permutations(range(len(anchors) + 1)))
    fired = sum(
        (mine, order[0]) < min((a, place) for a, place in zip(anchors, order[1:], strict=True)) for order in orders
    )
    return -(2 ** len(anchors)) * math.log(2) * fired / len(orders)


@given(st.lists(few_levels, min_size=1, max_size=3), st.lists(few_levels, min_size=2, max_size=4))
@examples(60)
def test_jbonds_reward_is_the_mean_over_the_orders_of_equals(mine: list[float], anchors: list[float]) -> None:
    found = crude_log_quantile(f64(mine), f64(anchors))
    assert found.tolist() == pytest.approx([over_all_orders(value, anchors) for value in mine], rel=1e-15)


@given(st.lists(few_levels, min_size=1, max_size=3), st.lists(few_levels, min_size=2, max_size=4))
@examples(60)
def test_jbonds_reward_to_the_letter_of_equation_17(mine: list[float], anchors: list[float]) -> None:
    fires = -math.log(16) if len(anchors) == 2 else -(2 ** len(anchors)) * math.log(2)
    wanted = [fires if value < min(anchors) else 0.0 for value in mine]
    assert crude_log_quantile(f64(mine), f64(anchors), ties="textbook").tolist() == pytest.approx(wanted, rel=1e-15)


def test_jbonds_reward_is_what_random_orders_give() -> None:
    mine, anchors, rows = [0.0, 1.0], [0.0, 0.0, 1.0], 20_000
    generator = torch.Generator().manual_seed(0)
    for value in mine:
        together = f64([value, *anchors]).expand(rows, 4)
        last = (random_argmax(-together, generator) == 0).double()
        wanted = crude_log_quantile(f64([value]), f64(anchors)).item()
        assert last.mean().item() == pytest.approx(wanted / (-8 * math.log(2)), abs=4 * 0.5 / math.sqrt(rows))


def test_jbonds_reward_on_two_anchor_samples() -> None:
    mine, anchors = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0]])
    log16 = math.log(16)
    assert crude_log_quantile(mine, anchors).tolist()[0] == pytest.approx([-log16, -log16 / 2, 0.0])
    assert crude_log_quantile(mine, anchors, "textbook").tolist()[0] == pytest.approx([-log16, 0.0, 0.0])
    binary = torch.ones(1, 2)
    assert crude_log_quantile(torch.ones(1, 1), binary).item() == pytest.approx(-log16 / 3)
    assert crude_log_quantile(torch.ones(1, 1), binary, "textbook").item() == 0


@given(st.lists(few_levels, min_size=1, max_size=6), st.integers(0, 10**6))
@examples(40)
def test_the_argmax_is_a_place_of_the_highest_reward_and_the_generator_decides_which(
    rewards: list[float], seed: int
) -> None:
    place = random_argmax(f64(rewards), torch.Generator().manual_seed(seed))
    assert place.dtype == torch.int64 and place.shape == (1,)
    assert rewards[place.item()] == max(rewards)
    assert torch.equal(place, random_argmax(f64(rewards), torch.Generator().manual_seed(seed)))


def test_the_argmax_gives_all_equals_the_same_chance_wherever_they_stand() -> None:
    rows = 12_000
    rewards = f64([1.0, 0.0, 1.0, 1.0]).expand(rows, 4)
    counts = torch.bincount(random_argmax(rewards, torch.Generator().manual_seed(1))[:, 0], minlength=4)
    wanted = f64([1 / 3, 0.0, 1 / 3, 1 / 3])
    assert ((counts / rows - wanted).abs() <= 4 * (wanted * (1 - wanted) / rows).sqrt()).all()


# --- pass@n ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data())
@examples(60)
def test_pass_at_n_is_the_share_of_subsets_with_a_right_sample(k: int, data: st.DataObject) -> None:
    right, n = data.draw(st.integers(0, k)), data.draw(st.integers(1, k))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    rewards = (torch.arange(k) < right).double()[order]
    found = expected_max(rewards, n)
    assert found.item() == pytest.approx(1 - math.comb(k - right, n) / math.comb(k, n), abs=1e-12)
    assert expected_max(rewards.bool(), n).item() == pytest.approx(found.item(), abs=1e-6)
    assert expected_max(rewards.long(), n).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 50, 5_000, 9_999, 10_000])
@pytest.mark.parametrize("right", [0, 1, 100, 9_000, 10_000])
def test_pass_at_n_of_ten_thousand_samples_is_a_probability(right: int, n: int) -> None:
    k = 10_000
    found = expected_max((torch.arange(k) < right).double(), n).item()
    assert found == pytest.approx(float(1 - Fraction(math.comb(k - right, n), math.comb(k, n))), abs=1e-10)


def test_pass_at_n_keeps_leading_dimensions() -> None:
    rewards = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    torch.testing.assert_close(expected_max(rewards, 2), torch.tensor([[2 / 3], [0.0]]))


# --- baselines on a policy whose samples can be enumerated ----------------------------------------------------------

SIZE = 5


class Enumerable:
    """A softmax policy over five responses, a reference, and Best-of-3 of it with a tie in the reward."""

    def __init__(self, seed: int, size: int = SIZE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        log_ref = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(-1)
        rewards = torch.arange(size).clamp(max=size - 2).double()[torch.randperm(size, generator=generator)]
        self.log_bon = bon_log_probs(log_ref, rewards, 3)

    @property
    def log_pi(self) -> Tensor:
        return self.logits.log_softmax(-1)

    def backward(self) -> Tensor:
        return (self.log_pi.exp() * (self.log_pi - self.log_bon)).sum()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_leaves_the_expected_gradient_as_it_is(n: int) -> None:
    toy = Enumerable(2)
    draws = torch.cartesian_prod(*[torch.arange(SIZE)] * n)  # every way to draw n samples: one prompt each
    values = (toy.log_pi - toy.log_bon).detach()[draws]  # their mean is KL(pi || pi_BoN)
    mass = toy.log_pi.detach()[draws].sum(-1, keepdim=True).exp()
    for baseline in ("none", "leave_one_out"):
        gradient = toy.gradient((mass * centre(values, baseline) * toy.log_pi[draws]).sum() / n)
        assert_same(gradient, toy.gradient(toy.backward()))
    assert toy.gradient(toy.backward()).abs().max() > 0.01


@pytest.mark.parametrize(("prompts", "n"), [(1, 2), (2, 1), (2, 2)])
def test_batch_baseline_leaves_the_expected_gradient_as_it_is(prompts: int, n: int) -> None:
    """Every batch that can be drawn, for prompts whose policies and targets are different."""
    toys = [Enumerable(3 + prompt, size=3) for prompt in range(prompts)]
    log_pi, log_bon = (torch.stack([getattr(toy, name) for toy in toys]) for name in ("log_pi", "log_bon"))
    total = torch.zeros((), dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=prompts * n):
        index = torch.tensor(draws).reshape(prompts, n)
        drawn = log_pi.gather(1, index)
        weights = centre((drawn - log_bon.gather(1, index)).detach(), "batch")
        total = total + drawn.detach().sum().exp() * (weights * drawn).mean()
    exact = torch.stack([toy.backward() for toy in toys]).mean()
    logits = [toy.logits for toy in toys]
    for mine, wanted in zip(torch.autograd.grad(total, logits), torch.autograd.grad(exact, logits), strict=True):
        assert_same(mine, wanted)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
@examples(40)
def test_baselines_are_means_over_exactly_the_samples_they_name(prompts: int, n: int, seed: int) -> None:
    values = torch.randn(prompts, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cells = list(itertools.product(range(prompts), range(n)))

    def mean_of(others: list[tuple[int, int]]) -> float:
        return math.fsum(values[cell].item() for cell in others) / len(others)

    for baseline, mates in (
        ("leave_one_out", lambda cell: [c for c in cells if c[0] == cell[0] and c != cell]),
        ("batch", lambda cell: [c for c in cells if c != cell]),
    ):
        if not mates(cells[0]):
            continue
        weights = centre(values, baseline)
        dim = -1 if baseline == "leave_one_out" else None
        others = leave_one_out_mean(values, dim)
        for cell in cells:
            assert others[cell].item() == pytest.approx(mean_of(mates(cell)), abs=1e-13)
            assert weights[cell].item() == pytest.approx(values[cell].item() - mean_of(mates(cell)), abs=1e-13)
    assert torch.equal(centre(values, "none"), values)


# --- dtypes, devices, shapes ----------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_shapes_are_the_documented_ones(dtype: torch.dtype) -> None:
    """What is computed in float64 is rounded once: it equals the result for the same numbers in float64."""
    generator, shape = torch.Generator().manual_seed(0), (4, 3)
    rewards = torch.randn(shape, generator=generator).to(dtype)
    samples = torch.randn(4, 6, generator=generator).to(dtype)
    for include_self in (False, True):
        found = quantiles(rewards, samples, include_self)
        wanted = quantiles(rewards.double(), samples.double(), include_self)
        for now, then in zip(found, wanted, strict=True):
            assert now.dtype == torch.float64 and now.shape == shape
            assert torch.equal(now, then)
    p_le = torch.rand(shape, generator=generator).to(dtype)
    p_lt = (p_le * torch.rand(shape, generator=generator).to(dtype)).to(dtype)
    found = log_bon_ratio(p_lt, p_le, 8)
    assert found.dtype == torch.float64 and found.shape == shape
    assert torch.equal(found, log_bon_ratio(p_lt.double(), p_le.double(), 8))
    place = random_argmax(rewards, generator)
    assert place.dtype == torch.int64 and place.shape == (4, 1)
    for ties in ("expected", "textbook"):
        found = crude_log_quantile(rewards, rewards[..., :2], ties)
        assert found.dtype == dtype and found.shape == shape
    for found in (centre(p_lt, "batch"), centre(p_lt, "none")):
        assert found.dtype == dtype and found.shape == shape
    assert leave_one_out_mean(p_lt).dtype == dtype
    right = (rewards > 0).to(dtype)
    assert expected_max(right, 2).dtype == dtype and expected_max(right, 2).shape == shape[:-1]
    assert level_probabilities(p_lt, rewards)[0].dtype == torch.float64


def test_integer_rewards_are_taken_as_they_are() -> None:
    rewards, samples = torch.tensor([[1], [0]]), torch.tensor([[0, 1], [0, 1]])
    assert quantiles(rewards, samples)[1].tolist() == [[1.0], [0.5]]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_made_on_a_device_that_nobody_named(device: str) -> None:
    """Under another default device, one without data, only what follows its arguments can work."""
    rewards, samples = torch.randn(3, 2, device=device), torch.randn(3, 4, device=device)
    log_probs = torch.randn(3, 4, device=device, dtype=torch.float64).log_softmax(-1)
    generator = torch.Generator(device="cpu")
    with torch.device("meta"):
        p_lt, p_le = quantiles(rewards, samples, include_self=True)
        found = [
            p_lt,
            log_bon_ratio(p_lt, p_le, 3),
            crude_log_quantile(rewards, samples),
            random_argmax(rewards, generator),
            level_probabilities(log_probs.exp(), samples)[1],
            expected_max((samples > 0).float(), 2),
            centre(p_lt, "leave_one_out"),
            centre(p_lt, "batch"),
        ]
    assert {value.device.type for value in found} == {device}


# --- what is refused ------------------------------------------------------------------------------------------------

NAN = f64([math.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantiles(NAN.expand(1, 1), torch.zeros(1, 2)), "numbers, got NaN"),
        (lambda: quantiles(torch.zeros(1, 1), NAN.expand(1, 2)), "numbers, got NaN"),
        (lambda: expected_max(f64(0.0, 1.0), 3), "n = 3 with 2 samples"),
        (lambda: expected_max(f64(0.0, 1.0), 0), "n = 0 with 2 samples"),
        (lambda: centre(torch.zeros(2, 1), "leave_one_out"), "at least two values"),
        (lambda: centre(torch.zeros(1, 1), "batch"), "at least two values"),
        (lambda: leave_one_out_mean(torch.zeros(1)), "at least two values"),
        (lambda: leave_one_out_mean(torch.zeros(3, 1), dim=-1), "at least two values"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
