"""The two-level bootstrap of the report, and curves that are evaluated in all resamples at once.

Every statistic is a tensor of *draws* ``[B + 1]``: entry 0 is computed from the data as they are, the other B
from resamples. A statistic of several means (a share of the limit, the gap between two fronts) is computed from
the draws of those means row by row, so that its interval respects how they vary together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import quantiles
from bond_plugin.bestofn.limits import tilted_means

LEVEL = 0.95
RESAMPLES = 1000
_BETAS = 256  # in the grid of a limit


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval; NaN in all three where it is not defined."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Tensor) -> Estimate:
        """From ``[B + 1]`` draws. Resamples in which the statistic is not defined are left out of the interval."""
        value, defined = draws[0].item(), draws[1:][draws[1:].isfinite()]
        if not math.isfinite(value) or not len(defined):
            return NOT_DEFINED
        tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        low, high = torch.quantile(defined, tails).tolist()
        return cls(value, low, high)


NOT_DEFINED = Estimate(math.nan, math.nan, math.nan)


class Resampling:
    """Resamples of prompts, the same for everything, and of seeds, drawn anew for each trained policy.

    All methods are evaluated on the same prompts, so differences between them are paired by prompt; runs of two
    methods have nothing in common through their seeds, so these are drawn independently. A resample draws seeds
    with replacement, then prompts, and averages over both (the seeds of a policy share the prompts).

    The same arguments, P and B, give the same intervals.
    """

    def __init__(self, prompts: int, resamples: int = RESAMPLES) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.resamples = resamples
        #: ``[B + 1, P]``, rows that add up to 1.
        self.prompts = self.weights(prompts)

    def weights(self, count: int) -> Tensor:
        """``[B + 1, count]``: how often each of ``count`` is drawn, divided by ``count``; equal in row 0."""
        drawn = torch.randint(count, (self.resamples, count), generator=self._generator)
        ones = torch.full(drawn.shape, 1 / count, dtype=torch.float64)
        resampled = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, ones)
        return torch.cat([torch.full((1, count), 1 / count, dtype=torch.float64), resampled])

    def mean(self, values: Tensor, seeds: Tensor | None = None) -> Tensor:
        """``[B + 1]`` draws of the mean of ``values``, ``[S, P]`` of S seeds, with ``seeds`` of :meth:`weights`.

        Without seeds ``[B + 1, C]``, of C columns ``[P, C]`` that are averaged over prompts alone.
        """
        if seeds is None:
            return self.prompts @ values
        return ((self.prompts @ values.T) * seeds).sum(dim=-1)


def envelope(x: Tensor, kl: Tensor, value: Tensor) -> Tensor:
    """The smallest concave function that does not fall and is nowhere below the points, in each row.

    It is what a random choice between two of the policies attains: the mixed value, at no more than the mixed KL,
    because the KL is convex.

    Args:
        x: ``[B, G]``, nats.
        kl, value: ``[B, n]``; one of the points should be the reference's, (0, base).

    Returns:
        ``[B, G]``; minus infinity to the left of all points.
    """
    x, kl, value = x.unsqueeze(-1), kl.unsqueeze(-2), value.unsqueeze(-2)
    best = torch.where(kl <= x, value, -math.inf).amax(dim=-1)  # with a KL of at most x
    for i in range(kl.shape[-1]):
        start, base = kl[..., i, None], value[..., i, None]
        chord = base + (value - base) * (x - start) / (kl - start)
        between = (start <= x) & (x < kl)
        best = torch.maximum(best, torch.where(between, chord, -math.inf).amax(dim=-1))
    return best


def limit_by_prompt(rewards: Tensor, ranked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL and value of each prompt's reference tilted by its reward, for one grid of beta for all prompts.

    The mean over prompts is :func:`bond_plugin.bestofn.limits.reward_front` (or, ranked, ``win_rate_front``),
    and the mean over resampled prompts is the front of those; the root of the KL is what to interpolate in.

    Args:
        rewards: ``[P, M]``.
        ranked: tilt by the quantile among the prompt's samples, whose mean is the win rate.

    Returns:
        (kl, value, win rate), each ``[P, G + 2]`` float64 for G values of beta, from the reference itself to its best
        samples. The win rate is that of the same tilted reference; ranked, it is the value.
    """
    rewards = rewards.double()
    beats = torch.stack(quantiles(rewards, rewards)).mean(dim=0)
    if ranked:
        rewards = beats
    best = rewards.amax(dim=-1)
    below = rewards - best.unsqueeze(-1)
    # Relative to the range of the rewards; the ends of the grid are the reference and the best samples.
    grid = 10 ** torch.linspace(-3, 6, _BETAS, dtype=torch.float64) / max(-below.min().item(), 1e-300)
    kl, gap, win_rate = (found.T for found in tilted_means(below, grid, below, beats))
    end = math.log(rewards.shape[-1]) - (below == 0).sum(dim=-1).double().log()
    kl = torch.column_stack([torch.zeros_like(best), kl, end]).clamp(min=0)
    value = torch.column_stack([rewards.mean(dim=-1), best.unsqueeze(-1) + gap, best])
    return kl, value, torch.column_stack([beats.mean(dim=-1), win_rate, beats.amax(dim=-1)])
