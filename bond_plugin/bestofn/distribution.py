"""The Best-of-N distribution: by quantiles of the reward, and exactly on a finite set.

Best-of-N draws N samples of the reference and keeps one with the highest reward. Write p_<(y) and p_<=(y) for
the probabilities that a sample of the reference has a lower reward than y, or one that is not higher. Then

    pi_BoN(y) / pi_ref(y) = (p_<=^N - p_<^N) / (p_<= - p_<) = p_<=^(N-1) sum_{i=1..N} (p_< / p_<=)^(i-1)

(Theorem 1 of arXiv 2407.14622, whose term (B) is the sum.) Stated for rewards that order the generations strictly, it
holds for tied rewards too, when ties are broken uniformly at random: a *level* v of the reward has probability
F(v)^N - F(v-)^N under Best-of-N, of which each generation at that level gets a share in proportion to pi_ref. What
needs the strict order is leaving term (B) out, as the paper does in practice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantiles(rewards: Tensor, samples: Tensor, include_self: bool = False) -> tuple[Tensor, Tensor]:
    """The shares of the reference's samples with a lower reward, and with one that is not higher (Eq. 10).

    Args:
        rewards: ``[B, m]``, the rewards to place.
        samples: ``[B, k]``, rewards of k >= 1 samples of the reference for the same prompts.
        include_self: count the placed reward as one more sample of the reference, so that log p_<= is finite:
            p_< = #{lower} / (k + 1), p_<= = (#{lower or equal} + 1) / (k + 1).

    Returns:
        (p_lt, p_le), each ``[B, m]`` float64 in [0, 1].

    Raises:
        ValueError: a reward is NaN, which has no place in an order.
    """
    if rewards.isnan().any() or samples.isnan().any():
        raise ValueError("quantiles needs rewards that are numbers, got NaN")
    values = rewards.detach().double().contiguous()
    ordered = samples.detach().double().sort(dim=-1).values.contiguous()
    lower = torch.searchsorted(ordered, values, right=False).double()
    not_higher = torch.searchsorted(ordered, values, right=True).double()
    own = int(include_self)
    count = samples.shape[-1] + own
    return lower / count, (not_higher + own) / count


def log_bon_ratio(p_lt: Tensor, p_le: Tensor, n: float) -> Tensor:
    """log pi_BoN(y) - log pi_ref(y) by Theorem 1 of arXiv 2407.14622, term (B) included: so for tied rewards too.

        (n - 1) log p_<= + log sum_{i=1..n} (p_< / p_<=)^(i-1)

    The sum is evaluated as (1 - q^n) / (1 - q) with expm1 and log1p, to float64 from p = 0 to q = 1 for any n.

    Args:
        p_lt, p_le: any shape, P(r(y') < r(y)) and P(r(y') <= r(y)) under the reference; estimates may be above 1.
        n: N of Best-of-N, >= 1. What is not whole lies on the curve between those that are.

    Returns:
        The same shape, float64, in nats. ``-inf`` where p_le = 0 and n > 1.
    """
    low, high = p_lt.double(), p_le.double()
    whole = high > 0
    safe = torch.where(whole, high, 1.0)
    gap = torch.where(whole, (safe - low) / safe, 1.0)  # 1 - q
    power = torch.log1p(-gap) * n  # log q^n
    apart = gap > 0
    # One log of the quotient: the logs of its parts are large and cancel where the gap is small.
    series = torch.where(apart, torch.log(-torch.expm1(power) / torch.where(apart, gap, 1.0)), math.log(n))
    return torch.where(whole, (n - 1) * torch.log(safe) + series, 0.0 if n == 1 else -math.inf)


def level_probabilities(probabilities: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """p_< and p_<= of every point of a finite distribution, exactly: ``[..., S]`` to two of ``[..., S]`` float64."""
    probabilities, rewards = probabilities.double(), rewards.double()
    ordered, index = rewards.sort(dim=-1)
    cumulative = probabilities.gather(-1, index).cumsum(dim=-1).clamp(max=1.0)
    padded = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], dim=-1)
    ordered, values = ordered.contiguous(), rewards.contiguous()
    p_lt = padded.gather(-1, torch.searchsorted(ordered, values, right=False))
    p_le = padded.gather(-1, torch.searchsorted(ordered, values, right=True))
    return p_lt, p_le


def bon_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: what KL(pi_BoN || pi_ref) is without ties, and never exceeds. In nats; n >= 1."""
    return math.log(n) - (n - 1) / n
