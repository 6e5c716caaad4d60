"""The best that any policy can do at a given KL: closed forms, optima found by search, policies that try to beat it.

Rewards of samples are an empirical distribution, and the fronts of that one are exact: what is searched and tried
here are policies on its samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from enumerated import bon_log_probs, examples, f64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bond_plugin.bestofn import limits
from bond_plugin.bestofn.distribution import bon_kl_bound
from bond_plugin.bestofn.estimates import win_rate
from bond_plugin.bestofn.limits import (
    Front,
    best_of_n_curve,
    bon_kl_from_samples,
    bon_win_rate,
    pareto_front,
    reward_front,
    win_rate_front,
)

FRONTS = [reward_front, win_rate_front]


def bon_kl(log_ref: Tensor, rewards: Tensor, n: int) -> Tensor:
    """KL(Best-of-n || reference) of a finite distribution, as it is defined."""
    best = bon_log_probs(log_ref, rewards, n)
    return torch.where(best > -math.inf, best.exp() * (best - log_ref), 0.0).sum(dim=-1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Rewards whose mean and variance over all entries are 0 and 1 exactly, so that little is left to chance."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (found - found.mean()) / found.std()


def uniform_by_tilt(inverse_beta: float) -> tuple[float, float]:
    """KL and mean of the uniform distribution on [0, 1] tilted by exp(u / beta)."""
    log_total = inverse_beta + math.log(-math.expm1(-inverse_beta) / inverse_beta)
    mean = -1 / math.expm1(-inverse_beta) - 1 / inverse_beta
    return inverse_beta * mean - log_total, mean


def root_front(end: float = 8.0, supported: bool = True) -> Front:
    """The front of Gaussian rewards itself."""
    kl = torch.linspace(0, end, 2001, dtype=torch.float64)
    return Front(kl, (2 * kl).sqrt(), torch.zeros_like(kl), torch.full((2001,), supported) | (kl < 1))


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_gaussian_rewards_gain_the_root_of_twice_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_POINTS", 64)
    front = reward_front(40 * gaussian(256, 256) - 3)
    kl = f64(0.01, 0.1, 0.5, 1.0, 1.84)
    gain = 40 * (2 * kl).sqrt()
    assert front.supported_at(kl).all() and not front.supported_at(3.0)
    error, corrected = ((f.at(kl) + 3) / gain - 1 for f in (front, front.corrected()))
    assert error.abs().max() < 0.02 and error[-1] < -0.005
    assert corrected.abs().max() < 0.006
    assert front.corrected().bias.abs().max() == 0


def test_uniform_rewards_follow_their_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_POINTS", 64)
    rewards = torch.rand(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    front = reward_front(rewards - rewards.mean() + 0.5)
    for inverse_beta in (0.1, 1.0, 3.0, 10.0, 40.0):
        kl, mean = uniform_by_tilt(inverse_beta)
        assert front.at(kl).item() - 0.5 == pytest.approx(mean - 0.5, rel=0.006)
        assert front.supported_at(kl)


@pytest.mark.parametrize("samples", [16, 128, 257])
def test_win_rate_without_ties_is_that_of_uniform_rewards_whatever_the_rewards_are(samples: int) -> None:
    rewards = gaussian(3, samples).exp() * f64(1.0, -2.0, 1e-6).unsqueeze(-1)
    front = win_rate_front(rewards)
    assert front.base == 0.5
    assert front.kl[-1].item() == pytest.approx(math.log(samples))
    assert front.value[-1].item() == pytest.approx(1 - 0.5 / samples)
    for inverse_beta in (0.01, 0.3, 1.0, 4.0, samples / 8, samples / 2):
        kl, mean = uniform_by_tilt(inverse_beta)
        # The midpoint rule with M intervals misses log Z by (1 / (beta M))^2 / 24.
        assert front.at(kl).item() == pytest.approx(mean, abs=inverse_beta / samples**2 / 12 + 1e-5)
        assert mean == pytest.approx(1 / (1 - math.exp(-inverse_beta)) - 1 / inverse_beta)


@pytest.mark.parametrize(("right", "samples"), [(1, 8), (4, 8), (7, 8), (30, 100)])
def test_right_or_wrong_has_the_kl_of_two_levels(right: int, samples: int) -> None:
    rewards = torch.zeros(1, samples)
    rewards[0, torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:right]] = 1
    share = right / samples
    by_reward, by_win_rate = (front(rewards) for front in FRONTS)
    assert by_reward.base == pytest.approx(share) and by_win_rate.base == 0.5
    for accuracy in torch.linspace(share + 1e-3, 1 - 1e-9, 9, dtype=torch.float64).tolist():
        kl = accuracy * math.log(accuracy / share) + (1 - accuracy) * math.log((1 - accuracy) / (1 - share))
        assert by_reward.at(kl).item() == pytest.approx(accuracy, abs=2e-4)
        wins = accuracy * (1 - share / 2) + (1 - accuracy) * (1 - share) / 2
        assert by_win_rate.at(kl).item() == pytest.approx(wins, abs=2e-4)
    for front, best in ((by_reward, 1.0), (by_win_rate, 1 - share / 2)):
        assert front.kl[-1].item() == pytest.approx(-math.log(share))
        assert front.value[-1].item() == pytest.approx(best)


# --- the optimum, found otherwise -----------------------------------------------------------------------------------


def test_two_prompts_share_the_kl_as_a_search_over_all_their_policies_does() -> None:
    """The second prompt has ten times as much to gain: one KL for both, or one for each, would both be wrong."""
    rewards = f64([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 10.0, 10.0]])
    front = reward_front(rewards)
    best = torch.linspace(0, 1, 1501, dtype=torch.float64)  # the mass on each prompt's best level

    def divergence(share: float) -> Tensor:
        return torch.xlogy(best, best / share) + torch.xlogy(1 - best, (1 - best) / (1 - share))

    kl = (divergence(0.25).unsqueeze(-1) + divergence(0.5)) / 2
    value = (best.unsqueeze(-1) + 10 * best) / 2
    for budget in (0.02, 0.1, 0.3, 0.5, 0.8, 1.0):
        searched = value[kl <= budget].max().item()
        assert front.at(budget).item() == pytest.approx(searched, abs=0.006)
        assert front.at(budget).item() >= searched - 1e-4


def test_three_levels_against_a_search_over_the_simplex() -> None:
    rewards = f64([[0.0, 0.0, 0.0, 2.0, 2.0, 3.0]])
    steps = torch.linspace(0, 1, 401, dtype=torch.float64)
    middle, best = torch.meshgrid(steps, steps, indexing="ij")
    lowest = 1 - middle - best
    inside = lowest >= 0
    masses = [part[inside] for part in (lowest, middle, best)]
    kl = sum(torch.xlogy(mass, mass / share) for mass, share in zip(masses, (1 / 2, 1 / 3, 1 / 6), strict=True))
    # Win rates of the levels: what is below, and half of what is equal.
    for front, levels in ((reward_front(rewards), (0, 2, 3)), (win_rate_front(rewards), (1 / 4, 2 / 3, 11 / 12))):
        value = sum(mass * level for mass, level in zip(masses, levels, strict=True))
        for budget in (0.01, 0.1, 0.4, 0.8, 1.3, 1.75):
            searched = value[kl <= budget].max().item()
            assert searched - 1e-4 <= front.at(budget).item() <= searched + 0.02


Prompts = list[list[int]]
rewards_of_prompts = st.integers(2, 6).flatmap(
    lambda samples: st.lists(st.lists(st.integers(-3, 3), min_size=samples, max_size=samples), min_size=1, max_size=3)
)


def level(rewards: Tensor) -> Tensor:
    """The win rate of each sample against all samples of its prompt."""
    return torch.stack([win_rate(column.unsqueeze(-1), rewards) for column in rewards.unbind(-1)], dim=-1)


@given(rewards_of_prompts, st.sampled_from(FRONTS), st.floats(0.01, 5), st.integers(0, 10**6))
@examples(80)
def test_no_policy_beats_the_front(
    prompts: Prompts, make: Callable[[Tensor], Front], sharpness: float, seed: int
) -> None:
    """Random policies, and those that are nearly the best: tilted with a beta of each prompt's own, and jittered."""
    rewards = f64(prompts)
    values = rewards if make is reward_front else level(rewards)
    front = make(rewards)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(40, *rewards.shape, generator=generator, dtype=torch.float64)
    beta = 3 * torch.rand(40, len(prompts), 1, generator=generator, dtype=torch.float64)
    strength = torch.rand(40, 1, 1, generator=generator, dtype=torch.float64).round(decimals=1)
    log_pi = (sharpness * (strength * noise + values / beta)).log_softmax(-1)
    pi = log_pi.exp()
    kl = (pi * (log_pi + math.log(rewards.shape[-1]))).sum(-1).mean(-1)
    value = (pi * values).sum(-1).mean(-1)
    limit = torch.where(kl <= front.kl[-1], front.at(kl), front.value[-1])
    spread = (values.max() - values.min()).item()
    assert (value <= limit + 2e-4 * spread + 1e-12).all()


@given(rewards_of_prompts, st.sampled_from(FRONTS), st.floats(0.05, 20))
@examples(50)
def test_one_beta_for_all_prompts_is_on_the_front(
    prompts: Prompts, make: Callable[[Tensor], Front], inverse_beta: float
) -> None:
    rewards = f64(prompts)
    values = rewards if make is reward_front else level(rewards)
    log_pi = (inverse_beta * values).log_softmax(-1)
    kl = (log_pi.exp() * (log_pi + math.log(rewards.shape[-1]))).sum(-1).mean().clamp(min=0)
    value = (log_pi.exp() * values).sum(-1).mean().item()
    front = make(rewards)
    if kl <= front.kl[-1]:
        assert front.at(kl).item() == pytest.approx(value, abs=3e-4 * (values.max() - values.min()).item() + 1e-12)
    else:
        assert kl.item() == pytest.approx(front.kl[-1].item(), abs=1e-9)


@given(rewards_of_prompts, st.sampled_from(FRONTS))
@examples(40)
def test_a_front_rises_ever_more_slowly_to_the_best_samples(
    prompts: Prompts, make: Callable[[Tensor], Front]
) -> None:
    rewards = f64(prompts)
    values = rewards if make is reward_front else level(rewards)
    front = make(rewards)
    assert front.kl[0] == 0 and front.value[0].item() == front.base == pytest.approx(values.mean().item())
    assert front.value[-1].item() == pytest.approx(values.amax(-1).mean().item())
    kl, value = front.kl.diff(), front.value.diff()
    assert (kl >= 0).all() and (value >= 0).all()
    slopes = (value / kl)[kl > 1e-7]
    assert (slopes.diff() <= 1e-5 * slopes[:-1] + 1e-9).all()
    torch.testing.assert_close(front.at(front.kl), front.value)


@given(rewards_of_prompts, st.integers(1, 40))
@examples(40)
def test_best_of_n_is_below_both_fronts(prompts: Prompts, n: int) -> None:
    rewards = f64(prompts)
    uniform = torch.full_like(rewards, -math.log(rewards.shape[-1]))
    kl, best = bon_kl(uniform, rewards, n).mean(), bon_log_probs(uniform, rewards, n).exp()
    for make, values in ((reward_front, rewards), (win_rate_front, level(rewards))):
        front = make(rewards)
        limit = front.at(kl.clamp(max=front.kl[-1].item())).item()
        assert (best * values).sum(-1).mean().item() <= limit + 2e-4 * (values.max() - values.min()).item() + 1e-12


# --- what the fronts do not depend on -------------------------------------------------------------------------------


def test_order_alone_decides_the_win_rate_front() -> None:
    rewards = torch.randint(6, (5, 40), generator=torch.Generator().manual_seed(0)).double()
    wanted = win_rate_front(rewards)
    for transform in (torch.exp, lambda r: r**3 - 100, lambda r: r * f64(1, 2, 3, 1e9, 1e-9).unsqueeze(-1)):
        found = win_rate_front(transform(rewards))
        for mine, other in zip(vars(wanted).values(), vars(found).values(), strict=True):
            assert torch.equal(mine, other)
    assert not torch.allclose(win_rate_front(-rewards).value, wanted.value, atol=1e-4)


def test_units_and_what_a_prompt_adds_to_all_its_rewards_change_no_kl() -> None:
    rewards = gaussian(4, 32)
    wanted = reward_front(rewards)
    shift = f64(0.0, 5.0, -20.0, 3.0)
    found = reward_front(7 * rewards + shift.unsqueeze(-1))
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, 7 * wanted.value + shift.mean())
    torch.testing.assert_close(found.bias, 7 * wanted.bias, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.supported, wanted.supported)


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
def test_rewards_of_any_size_give_the_same_front(scale: float) -> None:
    rewards = gaussian(3, 16)
    wanted, found = reward_front(rewards), reward_front(scale * rewards)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value / scale, wanted.value)


def test_two_nearly_equal_best_rewards_are_told_apart_in_the_end() -> None:
    front = reward_front(f64([[0.0] * 6 + [1.0, 1.0 + 1e-9]]))
    assert front.kl[-1].item() == pytest.approx(math.log(8))
    assert (front.kl.diff() >= 0).all() and (front.value.diff() >= 0).all()
    assert front.at(math.log(4)).item() == pytest.approx(1.0, abs=1e-3)


# --- how far the samples carry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FRONTS)
def test_constant_rewards_leave_nothing_to_gain(make: Callable[[Tensor], Front]) -> None:
    front = make(f64([[2.0] * 5, [4.0] * 5]))
    value = 3.0 if make is reward_front else 0.5
    assert front.kl.tolist() == front.bias.tolist() == [0.0]
    assert front.at(f64([0.0, 1e-12, 3.0])).tolist() == pytest.approx([value] * 3)
    assert front.supported.all() and front.supported_at(2.0)
    assert front.at(math.nan).isnan() and not front.supported_at(math.nan)
    assert front.at(1.0).item() == front.base


@pytest.mark.parametrize("make", FRONTS)
def test_prompts_with_constant_rewards_keep_to_the_reference(make: Callable[[Tensor], Front]) -> None:
    varied = gaussian(2, 64)
    alone, both = make(varied), make(torch.cat([varied, torch.ones(2, 64)]))
    constant = 1.0 if make is reward_front else 0.5
    kl = f64(0.01, 0.2, 1.0, 1.5)
    torch.testing.assert_close(both.at(kl / 2), (alone.at(kl) + constant) / 2, rtol=0, atol=2e-4)
    assert both.kl[-1].item() == pytest.approx(math.log(64) / 2)


def test_beyond_its_end_a_front_goes_on_only_where_more_samples_would_find_no_more() -> None:
    right = (gaussian(64, 64) > 0.5).double()
    assert right.sum(-1).min() > 5
    front = reward_front(right)
    assert front.supported.all()
    assert front.at(f64(front.kl[-1].item() + 1, 100.0)).tolist() == [1.0, 1.0] and front.supported_at(100.0)
    front = reward_front(gaussian(64, 64))
    assert front.at(math.log(64) + 1e-9).isnan() and not front.at(math.log(64) - 1e-9).isnan()
    assert front.supported_at(f64(0.0, 0.4, 2.0, 4.0, 9.0)).tolist() == [True, True, False, False, False]
    assert front.at(math.nan).isnan() and not front.supported_at(math.nan)


def test_supported_ends_where_the_bias_first_exceeds_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = gaussian(128, 64)
    reach = []
    for tolerance in (0.01, 0.02, 0.05, 1.0):
        monkeypatch.setattr(limits, "_TOLERANCE", tolerance)
        front = reward_front(rewards)
        within = front.bias.abs() <= tolerance * (front.value - front.base)
        count = int(front.supported.sum())
        assert front.supported[:count].all() and within[:count].all()
        assert count == len(within) or not within[count]
        reach.append(count)
    assert reach == sorted(set(reach)) and reach[-1] == 258


def test_support_that_is_lost_does_not_return() -> None:
    """With one prompt the bias is noisy, and may pass through zero again where nothing is supported any more."""
    returned = 0
    for seed in range(8):
        front = reward_front(gaussian(1, 64, seed=seed))
        within = front.bias.abs() <= 0.02 * (front.value - front.base)
        count = int(front.supported.sum())
        assert front.supported[:count].all() and within[:count].all() and not front.supported[count:].any()
        returned += bool(within[count:].any())
    assert returned > 0


def test_between_its_points_a_front_is_straight_in_the_root_of_the_kl() -> None:
    front = root_front()
    coarse = Front(*(column[::250] for column in vars(front).values()))
    kl = f64(0.0, 1e-6, 0.3, 1.7, 7.9, 8.0)
    assert coarse.at(kl).tolist() == pytest.approx((2 * kl).sqrt().tolist(), abs=1e-12)
    assert coarse.at(-1e-9).item() == coarse.base == 0.0


def test_bias_is_what_half_the_samples_lack() -> None:
    """Halves that are the same leave no bias; halves that cannot see the best rewards leave most of it."""
    repeated = gaussian(3, 20).repeat_interleave(2, dim=-1)
    assert reward_front(repeated).bias.abs().max() < 1e-3
    front = reward_front(f64([[0.0, 1.0, 0.0, 1.0]]))  # every other sample: each half is constant
    torch.testing.assert_close(front.bias, front.base - front.value)
    assert front.supported.tolist() == [True] + [False] * (len(front.kl) - 1)
    # One half has two levels and the front of right or wrong, the other has nothing to choose from.
    front = reward_front(f64([[0.0, 1.0, 1.0, 1.0]]))
    half = reward_front(f64([[0.0, 1.0]]))
    wanted = (half.at(front.kl.clamp(max=math.log(2))) - 0.5) / 2 - (front.value - front.base)
    torch.testing.assert_close(front.bias, wanted)


def test_an_odd_number_of_samples_starts_without_bias() -> None:
    front = reward_front(gaussian(5, 33))
    assert front.bias[0] == 0 and front.supported[0]


def test_the_front_of_samples_is_too_low_on_average_and_less_so_with_more() -> None:
    """As the docstring of the module proves; 2,048 prompts leave 1 % of chance."""
    kl = f64(0.3, 1.0, 2.0)
    few, more = (reward_front(gaussian(2048, samples, seed=1)).at(kl) for samples in (16, 32))
    assert (few < more).all() and (more < (2 * kl).sqrt()).all()


# --- Best-of-n ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 64, 1000])
def test_kl_without_ties_is_the_continuous_one(n: int) -> None:
    found = bon_kl_from_samples(gaussian(3, 50), n)
    assert found.dtype == torch.float64 and found.shape == (3,)
    assert found.tolist() == pytest.approx([bon_kl_bound(n)] * 3, abs=1e-12)


@given(rewards_of_prompts, st.sampled_from([1, 2, 5, 64, 1000]))
@examples(40)
def test_kl_of_levels_that_occur_twice_is_that_of_the_finite_distribution(prompts: Prompts, n: int) -> None:
    rewards = f64(prompts).repeat(1, 2)
    uniform = torch.full_like(rewards, -math.log(rewards.shape[-1]))
    found = bon_kl_from_samples(rewards, n)
    assert found.tolist() == pytest.approx(bon_kl(uniform, rewards, n).tolist(), abs=1e-12)


@pytest.mark.parametrize("right", [0, 2, 7, 18, 20])
def test_kl_of_right_or_wrong_is_that_of_two_levels(right: int) -> None:
    rewards = torch.tensor([[0] * (20 - right) + [1] * right])
    for n in (1, 2, 8, 100):
        masses = f64(1 - right / 20, right / 20)
        assert bon_kl_from_samples(rewards, n).item() == pytest.approx(bon_kl(masses.log(), f64(0, 1), n).item())


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_kl_of_levels_among_continuous_rewards_is_its_integral(n: int) -> None:
    rewards = f64([[0.0, 0.0, 0.0, 0.4, 0.7, 1.0, 1.0, 1.3]])
    u = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000
    density = n * u ** (n - 1)
    for low, high in ((0, 3 / 8), (5 / 8, 7 / 8)):
        level = (u > low) & (u < high)
        density[level] = (high**n - low**n) / (high - low)
    assert density.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert bon_kl_from_samples(rewards, n).item() == pytest.approx(
        torch.xlogy(density, density).mean().item(), abs=1e-6
    )


@given(rewards_of_prompts, st.integers(1, 5000))
@examples(40)
def test_kl_stays_within_its_bound(prompts: Prompts, n: int) -> None:
    found = bon_kl_from_samples(f64(prompts), n)
    assert (found >= -1e-12).all() and (found <= bon_kl_bound(n) + 1e-12).all()


@given(rewards_of_prompts, st.data())
@examples(40)
def test_win_rate_is_the_mean_over_all_choices_of_n_samples_and_an_opponent(
    prompts: Prompts, data: st.DataObject
) -> None:
    samples = len(prompts[0])
    n = data.draw(st.integers(1, samples - 1))
    wanted = []
    for rewards in prompts:
        wins, games = Fraction(), 0
        for chosen in itertools.combinations(range(samples), n):
            best = max(rewards[i] for i in chosen)
            for opponent in set(range(samples)) - set(chosen):
                wins += Fraction(best > rewards[opponent]) + Fraction(best == rewards[opponent], 2)
                games += 1
        wanted.append(float(wins / games))
    found = bon_win_rate(torch.tensor(prompts), n)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, abs=1e-14)


def test_win_rate_without_ties_depends_on_n_alone() -> None:
    for n in (1, 2, 16, 199):
        assert bon_win_rate(gaussian(3, 200), n).tolist() == pytest.approx([n / (n + 1)] * 3, abs=1e-13)


def test_win_rate_agrees_with_that_of_drawn_best_of_n() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(4, (2, 40_000), generator=generator).double()
    best = rewards[:1].reshape(1, -1, 4).amax(-1)
    assert bon_win_rate(rewards[1:, :2000], 4).item() == pytest.approx(win_rate(best, rewards[1:]).item(), abs=0.01)


def test_curve_has_a_value_a_prompt_and_their_means() -> None:
    rewards, ns = gaussian(5, 40), (1, 2, 8, 39)
    curve = best_of_n_curve(rewards.float(), list(ns))
    assert curve.ns == ns
    kl, reward, wins = curve.mean()
    assert kl.tolist() == pytest.approx([bon_kl_bound(n) for n in ns])
    assert wins.tolist() == pytest.approx([n / (n + 1) for n in ns])
    assert reward[0].item() == pytest.approx(rewards.mean().item(), abs=1e-6)
    for values, mean in ((curve.kl, kl), (curve.reward, reward), (curve.win_rate, wins)):
        assert values.shape == (5, 4) and values.dtype == torch.float64
        torch.testing.assert_close(values.mean(0), mean)
    for row in range(5):
        alone = best_of_n_curve(rewards[row : row + 1].float(), ns)
        torch.testing.assert_close(alone.reward[0], curve.reward[row])


# --- comparing methods ----------------------------------------------------------------------------------------------


def test_best_of_16_has_92_percent_of_what_gaussian_rewards_allow() -> None:
    """1.76599 is the mean of the highest of 16 standard normal variables."""
    exact = 1.76599 / math.sqrt(2 * bon_kl_bound(16))
    assert exact == pytest.approx(0.922, abs=5e-4)
    rewards = gaussian(256, 256, seed=2) + 10
    kl, reward, _ = best_of_n_curve(rewards, [16]).mean()
    front = reward_front(rewards).corrected()
    assert ((reward - front.base) / (front.at(kl) - front.base)).item() == pytest.approx(0.922, abs=0.01)


points_in_the_plane = st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 4)), max_size=8)


@given(points_in_the_plane)
@examples(50)
def test_pareto_front_is_what_its_definition_says(points: list[tuple[int, int]]) -> None:
    wanted = [not any(k <= kl and v >= value and (k < kl or v > value) for k, v in points) for kl, value in points]
    kl, value = torch.tensor(points, dtype=torch.float64).reshape(-1, 2).unbind(-1)
    found = pareto_front(kl, value)
    assert found.dtype == torch.bool and found.tolist() == wanted


# --- types, devices, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_everything_is_computed_in_float64(dtype: torch.dtype) -> None:
    rewards = (4 * gaussian(3, 12)).to(dtype)
    for make in FRONTS:
        found, wanted = make(rewards), make(rewards.double())
        for mine, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
            assert torch.equal(mine, other) and mine.dtype in (torch.float64, torch.bool)
        assert len(found.kl) == 258
        assert found.at(torch.ones(2, 3)).shape == found.supported_at(torch.ones(2, 3)).shape == (2, 3)
        assert found.at(0.5).dtype == torch.float64 and found.at(0.5).shape == ()
    assert torch.equal(best_of_n_curve(rewards, [3]).reward, best_of_n_curve(rewards.double(), [3]).reward)


def test_nothing_is_made_on_a_device_that_nobody_named() -> None:
    rewards, kl = gaussian(3, 8), f64([0.1, 0.5])
    with torch.device("meta"):
        front = reward_front(rewards)
        found = [*vars(front).values(), front.at(kl), front.supported_at(kl), *best_of_n_curve(rewards, [2]).mean()]
        found += [pareto_front(kl, kl), *vars(win_rate_front(rewards).corrected()).values()]
    assert {value.device.type for value in found} == {"cpu"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_front(torch.zeros(4)), r"rewards \[P, M\].*got \(4,\)"),
        (lambda: win_rate_front(torch.zeros(4, 1)), r"two samples, got \(4, 1\)"),
        (lambda: reward_front(torch.zeros(0, 4)), "at least one prompt"),
        (lambda: reward_front(f64([[0.0, math.nan]])), "finite rewards"),
        (lambda: win_rate_front(f64([[0.0, math.inf]])), "finite rewards"),
        (lambda: best_of_n_curve(f64([[0.0, math.nan]]), [1]), "finite rewards"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
