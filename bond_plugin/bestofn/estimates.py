"""Estimates from samples: the reward of Best-of-N, and win rates."""

from __future__ import annotations

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import quantiles


def expected_max(rewards: Tensor, n: int) -> Tensor:
    """The mean reward of Best-of-n, estimated without bias from k >= n samples.

    The average of the maximum over all subsets of n of the k samples (the U-statistic of the maximum). With
    r_(1) <= ... <= r_(k) the sorted rewards, r_(i) is the maximum of C(i-1, n-1) of the C(k, n) subsets:

        E[max of n] ~ sum_{i=n}^{k} C(i-1, n-1) / C(k, n) r_(i)

    The weights are computed from log-gamma in float64; their error is below 1e-10 for k up to 10,000.

    Args:
        rewards: ``[..., k]``, independent samples from one distribution along the last dimension.
        n: how many samples Best-of-n draws, 1 <= n <= k. 1 gives the mean, k the maximum.

    Returns:
        ``[...]`` in the dtype of ``rewards`` (float32 for integers), in units of the reward.

    Raises:
        ValueError: n < 1, or n > k: no unbiased estimate exists.
    """
    k = rewards.shape[-1] if rewards.dim() else 0
    if not 1 <= n <= k:
        raise ValueError(f"expected_max needs 1 <= n <= samples, got n = {n} with {k} samples")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return _over_subsets(rewards.double().sort(dim=-1).values, n).to(dtype)


def expected_at_max(rewards: Tensor, values: Tensor, n: int) -> Tensor:
    """The mean of ``values`` at the sample of Best-of-n, of equal rewards each equally likely; without bias.

    Such as whether it is right, where the reward is a model's. As :func:`expected_max`, which it is for
    ``values = rewards``; within a level of the reward the values are replaced by their mean.

    Args:
        rewards, values: ``[..., k]``.
        n: 1 <= n <= k.

    Returns:
        ``[...]`` float64, in units of ``values``.
    """
    equal = (rewards.unsqueeze(-1) == rewards.unsqueeze(-2)).double()
    of_level = (equal * values.double().unsqueeze(-2)).sum(dim=-1) / equal.sum(dim=-1)
    return _over_subsets(of_level.gather(-1, rewards.argsort(dim=-1)), n)


def _over_subsets(ordered: Tensor, n: int) -> Tensor:
    """The mean over all subsets of n of what stands at their last place, ``[..., k]`` float64 to ``[...]``."""
    k = ordered.shape[-1]
    position = torch.arange(n, k + 1, dtype=torch.float64, device=ordered.device)
    log_weight = _log_binomial(position - 1, n - 1) - _log_binomial(position.new_tensor(k), n)
    return (ordered[..., n - 1 :] * log_weight.exp()).sum(dim=-1)


def pass_at_n(rewards: Tensor, n: int) -> Tensor:
    """The probability that at least one of n samples is right, estimated without bias from k >= n samples.

        1 - C(k - c, n) / C(k, n),   c = number of right ones

    This is :func:`expected_max` of 0/1 rewards: Best-of-n is right exactly when one of its n samples is.

    Args:
        rewards: ``[..., k]``, each 0 or 1.
        n: 1 <= n <= k.

    Returns:
        ``[...]`` in the dtype of ``rewards`` (float32 for integers and booleans), in [0, 1].

    Raises:
        ValueError: n out of range, or a reward that is neither 0 nor 1.
    """
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError("pass_at_n needs rewards that are 0 or 1")
    return expected_max(rewards, n).clamp(0, 1)


def _log_binomial(total: Tensor, chosen: int) -> Tensor:
    part = total.new_tensor(chosen)
    return torch.lgamma(total + 1) - torch.lgamma(part + 1) - torch.lgamma(total - part + 1)


def win_rate(rewards: Tensor, against: Tensor) -> Tensor:
    """How often a sample beats a sample of the other side, over all k x m pairs; a tie counts one half.

        (1 / k m) sum_{i, j} ( 1{a_i > b_j} + 1/2 1{a_i = b_j} )

    Args:
        rewards: ``[P, k]``, k >= 1.
        against: ``[P, m]``, m >= 1.

    Returns:
        ``[P]`` float64 in [0, 1]. ``win_rate(a, b) + win_rate(b, a) == 1``.

    Raises:
        ValueError: other shapes, or NaN.
    """
    below, not_above = quantiles(rewards, against)
    return (below + not_above).mean(dim=-1) / 2
