"""Best-of-n rewards, win rates and bootstrap intervals against enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bond_plugin.bench.resampling import Estimate, Resampling
from bond_plugin.bestofn.estimates import expected_max, win_rate

# Few distinct values, so that ties are common.
rewards_lists = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)


@given(rewards_lists, st.data())
@settings(max_examples=60, deadline=None)
def test_expected_max_is_the_mean_over_all_subsets(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    subsets = [max(subset) for subset in itertools.combinations(rewards, n)]
    found = expected_max(torch.tensor(rewards, dtype=torch.float64), n)
    assert found.item() == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@given(rewards_lists, st.floats(0.1, 10), st.floats(-10, 10))
@settings(max_examples=60, deadline=None)
def test_expected_max_grows_with_n_and_follows_scale_and_shift(rewards, scale, shift):
    values = torch.tensor(rewards, dtype=torch.float64)
    levels = [expected_max(values, n).item() for n in range(1, len(rewards) + 1)]
    assert levels[0] == pytest.approx(values.mean().item(), abs=1e-12)
    assert levels[-1] == pytest.approx(values.max().item(), abs=1e-12)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(levels))
    moved = [expected_max(values * scale + shift, n).item() for n in range(1, len(rewards) + 1)]
    assert moved == pytest.approx([level * scale + shift for level in levels], abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5000, 9999, 10_000])
def test_expected_max_is_accurate_for_ten_thousand_samples(n):
    # For rewards 1 .. k the mean of the maximum over subsets is n (k + 1) / (n + 1).
    k = 10_000
    assert expected_max(torch.arange(1, k + 1).double(), n).item() == pytest.approx(n * (k + 1) / (n + 1), rel=1e-10)


def test_expected_max_of_uniform_samples_meets_the_expected_quantile_of_best_of_n():
    # E[quantile of Best-of-n] = n / (n + 1) for continuous rewards; unbiased also when k is hardly above n.
    samples = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 6):
        assert expected_max(samples, n).mean().item() == pytest.approx(n / (n + 1), abs=0.01)


def test_expected_max_keeps_leading_dimensions_and_dtype():
    assert expected_max(torch.randn(2, 3, 4), 2).shape == (2, 3)
    assert expected_max(torch.randn(2, 4, dtype=torch.bfloat16), 2).dtype == torch.bfloat16
    assert expected_max(torch.tensor([1, 2]), 1).item() == 1.5


@pytest.mark.parametrize(("rewards", "n"), [([1.0, 2.0], 3), ([1.0], 0), ([1.0], -1), ([], 1)])
def test_expected_max_refuses_what_has_no_unbiased_estimate(rewards, n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        expected_max(torch.tensor(rewards), n)


@given(rewards_lists, rewards_lists)
@settings(max_examples=60, deadline=None)
def test_win_rate_counts_every_pair(ours, theirs):
    pairs = [(a > b) + 0.5 * (a == b) for a in ours for b in theirs]
    a, b = torch.tensor([ours]), torch.tensor([theirs])
    assert win_rate(a, b).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert (win_rate(a, b) + win_rate(b, a)).item() == pytest.approx(1.0, abs=1e-12)


def test_win_rate_is_computed_prompt_by_prompt():
    ours = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    theirs = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert win_rate(ours, theirs).tolist() == pytest.approx([1.0, 1 / 6])


def test_win_rate_refuses_samples_of_other_prompts():
    with pytest.raises(RuntimeError, match="must match"):
        win_rate(torch.zeros(2, 3), torch.zeros(3, 3))


def interval(values: torch.Tensor, resamples: int = 1000) -> Estimate:
    resampling = Resampling(len(values), resamples)
    return Estimate.of(resampling.mean(values.double().unsqueeze(-1)).squeeze(-1))


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    trials, inside = 300, 0
    for _ in range(trials):
        found = interval(torch.randn(60, generator=generator), resamples=500)
        inside += found.low <= 0 <= found.high
    assert inside / trials == pytest.approx(0.95, abs=0.04)


def test_an_interval_has_the_width_of_the_standard_error_and_is_reproducible():
    values = torch.randn(400, generator=torch.Generator().manual_seed(2)) * 3 + 5
    found = interval(values)
    error = values.std().item() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.2 * error)
    assert interval(values) == found


def test_the_interval_of_one_value_has_no_width():
    assert interval(torch.tensor([2.5])) == Estimate(2.5, 2.5, 2.5)
