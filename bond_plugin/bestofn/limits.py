"""What no policy can exceed: the highest mean reward, and the highest win rate, at a given KL to the reference.

For one prompt, let pi_beta = pi_ref exp(r / beta) / Z(beta), Z(beta) = E_ref[exp(r / beta)]: the reference tilted
by its reward. KL(pi || pi_beta) >= 0 is, written out, for *every* policy pi

    E_pi[r]  <=  beta KL(pi || pi_ref) + beta log Z(beta),        with equality for pi = pi_beta      (1)

(the Gibbs variational principle; for RLHF see arXiv 2205.11275). Averaged over prompts with one
beta for all of them, (1) bounds the mean reward by the mean KL, and the tilted references reach it together: so a
single beta, not one a prompt, gives the highest mean reward at a given mean KL, and the *front* is
beta -> (mean KL, mean reward) of the tilted references. The win rate against one sample of the reference is
E_pi[F(r)] with F the mid-rank distribution function of the reward, a reward itself: (1) holds with F(r) for r.

M samples of the reference a prompt are enough to estimate both fronts, with weights softmax(r / beta):

    log Z = logsumexp(r / beta) - log M,     KL = E[r] / beta - log Z

That is the exact front of the samples' empirical distribution. It ends where only the best sample of each prompt has
weight, at a KL of log M without ties. For rewards it lies below the true front on average, as by (1) the front at a
KL of kappa is the minimum over beta of beta (kappa + mean log Z), and log and min are concave; :class:`Front`
estimates how far. For win rates without ties it misses that of infinitely many samples by less than 1 / M of the
possible gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import bon_kl_bound, log_bon_ratio, quantiles
from bond_plugin.bestofn.estimates import expected_max

_FIRST_KL = 1e-6  # where the grid of beta begins, in nats; from there to 0 the front is a root, which `at` follows
_LAST_SHARE = 0.999  # and where it stops, as a share of the KL at which only the best samples have weight
_POINTS = 256  # values of beta between the two, evenly spaced in its logarithm
_TOLERANCE = 0.02  # the bias of a front that is still supported, as a share of the gain over the reference
_CHUNK = 250_000  # weights at a time: 2 MB


@dataclass(frozen=True)
class Front:
    """A front on a grid of beta, from the reference itself (infinite beta) to its best samples (beta 0).

    ``supported`` says where the samples are enough: to be trusted for rewards with tails up to a Gaussian's. Where
    they are heavier, half the samples miss what all miss too, and the front is too low by more than it says;
    docs/bench.md has figures. With very few prompts the estimated bias is noisy.

    Attributes:
        kl: ``[S]`` float64, KL(pi || pi_ref) in nats a response, averaged over prompts. Increasing from 0.
        value: ``[S]``, mean reward or win rate of the best policy at that KL, increasing. ``value[0]`` is the
            reference's own.
        bias: ``[S]``, estimate minus truth, itself estimated: the mean front of both halves of the samples minus
            that of all, at the same KL. Right to first order, because the bias is in proportion to 1 / M.
        supported: ``[S]`` bool, True up to the first KL at which the bias exceeds 2 % of the gain over the reference.
    """

    kl: Tensor
    value: Tensor
    bias: Tensor
    supported: Tensor

    @property
    def base(self) -> float:
        """The value of the reference, at KL 0."""
        return self.value[0].item()

    def at(self, kl: Tensor | float) -> Tensor:
        """The highest value at these KLs in nats, any shape, interpolated linearly in the root of the KL; float64.

        Beyond the end of the front its last value where that is supported (as with 0/1 rewards, and with constant
        ones, whose front is a point): more KL buys nothing then. Else NaN.
        """
        kl = torch.as_tensor(kl, dtype=torch.float64, device=self.kl.device).clamp(min=0)
        found = over_root(kl.reshape(1, -1), self.kl[None], self.value[None]).reshape(kl.shape)
        known = (kl <= self.kl[-1]) | (self.supported[-1] & ~kl.isnan())
        return torch.where(known, found, math.nan)

    def supported_at(self, kl: Tensor | float) -> Tensor:
        """Whether the samples are enough to say what the highest value is at these KLs: bool, in their shape."""
        kl = torch.as_tensor(kl, dtype=torch.float64, device=self.kl.device)
        return (kl <= self.kl[self.supported].max()) | (self.supported[-1] & ~kl.isnan())

    def corrected(self) -> Front:
        """The same front with the estimated bias taken off its values."""
        value = (self.value - self.bias).cummax(dim=0).values
        return replace(self, value=value, bias=torch.zeros_like(self.bias))


def reward_front(rewards: Tensor) -> Front:
    """The highest mean reward at a given mean KL to the reference.

    From ``[P, M]`` rewards of M >= 2 independent samples of the reference for each of P prompts, in the order in
    which they were drawn: the bias compares every other sample, and sorting would hide it. If all prompts have
    constant rewards, the front is the one point (0, mean). Raises ValueError for another shape, or a reward that is
    not finite.
    """
    return _front(_checked(rewards), ranked=False)


def win_rate_front(rewards: Tensor) -> Front:
    """The highest mean win rate against one sample of the reference (a tie counts 1/2) at a given mean KL to it.

    Without ties it is one and the same function for all rewards: at beta, win rate 1 / (1 - exp(-1 / beta)) - beta.

    Arguments, result and errors as for :func:`reward_front`; values are win rates, from 1/2.
    """
    return _front(_checked(rewards), ranked=True)


def _front(rewards: Tensor, ranked: bool) -> Front:
    kl, value = _tilted(rewards, ranked)
    gain = value - value[0]
    bias = -gain
    for half in (rewards[:, 0::2], rewards[:, 1::2]):
        half_kl, half_value = _tilted(half, ranked)
        # Beyond its own end a half keeps its last value. Unless that is the best there is, the bias then counts
        # as larger than it is, which is on the safe side.
        found = over_root(kl[None], half_kl[None], half_value[None])[0]
        bias = bias + (found - half_value[0]) / 2
    supported = (bias.abs() <= _TOLERANCE * gain).long().cummin(dim=0).values.bool()
    return Front(kl, value, bias, supported)


def _tilted(rewards: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    """Mean KL and mean value of the empirical distributions tilted by one beta, from infinite beta to 0."""
    if ranked:
        rewards = torch.stack(quantiles(rewards, rewards)).mean(dim=0)
    best = rewards.amax(dim=-1, keepdim=True)
    below = rewards - best  # a shift of a prompt's rewards changes no weight; and exp cannot overflow
    scale = -below.min()
    mean = rewards.mean()
    if scale == 0:
        return torch.zeros_like(mean).reshape(1), mean.reshape(1)
    below = below / scale
    end = math.log(rewards.shape[-1]) - (below == 0).sum(dim=-1).double().log().mean()
    # KL = Var(r) / (2 beta^2) for small 1 / beta.
    first = (end.clamp(max=2 * _FIRST_KL) / below.var(dim=-1, correction=0).mean()).sqrt()
    last = 2 * first
    while tilted_means(below, last.reshape(1))[0].mean() < _LAST_SHARE * end:
        last = 2 * last
    share = torch.arange(_POINTS, dtype=torch.float64, device=rewards.device) / (_POINTS - 1)
    grid = first * (last / first) ** share
    kl, gap = (found.mean(dim=-1) for found in tilted_means(below, grid, below))
    kl = torch.cat([kl.new_zeros(1), kl, end.reshape(1)])
    value = torch.cat([mean.reshape(1), best.mean() + scale * gap, best.mean().reshape(1)])
    # Both increase; where two best rewards differ by little, rounding may not.
    return kl.clamp(min=0, max=end.item()).cummax(dim=0).values, value.cummax(dim=0).values


def tilted_means(rewards: Tensor, inverse_beta: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """KL to the reference in nats, and means of ``values``, under each prompt's samples tilted by their rewards.

    Of ``[P, M]`` rewards, none above 0 (less the best of its prompt, which changes no weight), so that exp cannot
    overflow, ``[B]`` 1 / beta, and values ``[P, M]``: ``[B, P]`` each.
    """
    parts = []
    for some in inverse_beta.split(max(1, _CHUNK // rewards.numel())):
        tilt = some.reshape(-1, 1, 1) * rewards
        log_total = tilt.logsumexp(dim=-1, keepdim=True)
        mass = (tilt - log_total).exp()
        kl = (mass * tilt).sum(dim=-1) - log_total.squeeze(-1) + math.log(rewards.shape[-1])
        parts.append((kl, *((mass * value).sum(dim=-1) for value in values)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class BestOfNCurve:
    """Best-of-n of the reference for n in ``ns``: ``[P, len(ns)]`` float64 each; KL in nats, a tie counts 1/2."""

    ns: tuple[int, ...]
    kl: Tensor
    reward: Tensor
    win_rate: Tensor

    def mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """(kl, reward, win_rate), each ``[len(ns)]``, averaged over prompts."""
        return self.kl.mean(dim=0), self.reward.mean(dim=0), self.win_rate.mean(dim=0)


def best_of_n_curve(rewards: Tensor, ns: Sequence[int]) -> BestOfNCurve:
    """Reward, win rate and KL of Best-of-n for several n, 1 <= n < M, from samples of the reference, ``[P, M]``.

    Rewards by :func:`~bond_plugin.bestofn.estimates.expected_max` and win rates by :func:`bon_win_rate`, both
    unbiased; KLs by :func:`bon_kl_from_samples`. Raises ValueError for another shape, or a reward that is not finite.
    """
    rewards, ns = _checked(rewards), tuple(ns)
    kl, reward, win_rate = (
        torch.stack([estimate(rewards, n) for n in ns], dim=-1)
        for estimate in (bon_kl_from_samples, expected_max, bon_win_rate)
    )
    return BestOfNCurve(ns, kl, reward, win_rate)


def bon_kl_from_samples(rewards: Tensor, n: int) -> Tensor:
    """KL(Best-of-n || reference) in nats, from rewards of samples of the reference, ``[P, M]`` to ``[P]`` float64.

    The samples stand for stretches [a, b] of the quantile: rewards that occur once for 1 / M of a continuous
    distribution, where the density of Best-of-n is n u^(n-1), and rewards that occur m >= 2 times for a level of
    mass b - a = m / M, which Best-of-n multiplies by one factor. A stretch adds to the KL

        once      integral of n u^(n-1) log(n u^(n-1)) du = [ u^n (log n + (n - 1) (log u - 1/n)) ] from a to b
        a level   (b^n - a^n) log((b^n - a^n) / (b - a))

    Without ties the sum is log n - (n - 1) / n; where every level occurs at least twice, the KL of the empirical
    distribution's Best-of-n. A level that occurs once counts as continuous: little difference for n well below M.
    """
    low, high = quantiles(rewards, rewards)
    log_ratio = log_bon_ratio(low, high, n)
    level = log_ratio.exp() * log_ratio / rewards.shape[-1]  # of the level's m samples, each has the m-th part
    once = _continuous_kl(high, n) - _continuous_kl(low, n)
    tied = (high - low) * rewards.shape[-1] > 1.5
    return torch.where(tied, level, once).sum(dim=-1)


def _continuous_kl(u: Tensor, n: int) -> Tensor:
    """The integral of n u^(n-1) log(n u^(n-1)) from 0 to u."""
    power = u**n
    return power * bon_kl_bound(n) + (n - 1) * torch.xlogy(power, u)


def bon_win_rate(rewards: Tensor, n: int) -> Tensor:
    """How often Best-of-n beats one more sample of the reference, estimated without bias; a tie counts 1/2.

    Each of the M samples is the opponent once; the best of n < M others is below it, or not above it, in

        C(#{lower}, n) / C(M - 1, n)     and     C(#{lower or equal} - 1, n) / C(M - 1, n)

    of all choices. The win rate is one minus the average of both: n / (n + 1) when no two are equal.
    ``[P, M]`` float64 to ``[P]`` float64.
    """
    others = rewards.shape[-1] - 1
    # C(c, n) / C(M - 1, n) for c = 0 .. M - 1: going down from c to c - 1 multiplies by (c - n) / c.
    count = torch.arange(others, 0, -1, dtype=torch.float64, device=rewards.device)
    factors = ((count - n) / count).clamp(min=0)
    share = torch.cat([factors.new_ones(1), factors.cumprod(dim=0)]).flip(0)
    low, high = ((quantile * (others + 1)).round().long() for quantile in quantiles(rewards, rewards))
    return 1 - (share[low] + share[high - 1]).mean(dim=-1) / 2


def pareto_front(kl: Tensor, value: Tensor) -> Tensor:
    """Which of ``[n]`` points no other beats: none has a KL as low and a value as high, and one of them better.

    Points that are equal in both stand or fall together. ``[n]`` bool.
    """
    no_worse = (kl <= kl.unsqueeze(-1)) & (value >= value.unsqueeze(-1))
    better = (kl < kl.unsqueeze(-1)) | (value > value.unsqueeze(-1))
    return ~(no_worse & better).any(dim=-1)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Linear in each row at ``[B, G]``; knots ``[B, K]`` do not decrease, and beyond them it is constant."""
    if knots.shape[-1] == 1:
        return values.expand(x.shape).clone()
    right = torch.searchsorted(knots.contiguous(), x.contiguous(), right=True).clamp(1, knots.shape[-1] - 1)
    start, end = knots.gather(-1, right - 1), knots.gather(-1, right)
    share = torch.where(end > start, (x - start) / (end - start), 1.0).clamp(0, 1)
    return torch.lerp(values.gather(-1, right - 1), values.gather(-1, right), share)


def over_root(kl: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """:func:`interpolate` in the root of the KL, in which fronts begin as straight lines; KLs below 0 count as 0."""
    return interpolate(kl.clamp(min=0).sqrt(), knots.sqrt(), values)


def _checked(rewards: Tensor) -> Tensor:
    if rewards.dim() != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise ValueError(f"need rewards [P, M] of at least one prompt and two samples, got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("need finite rewards: leave out prompts of which a sample has none")
    return rewards.detach().double()
