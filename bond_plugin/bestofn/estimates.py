"""Estimates from samples: the reward of Best-of-N, win rates, and how far to trust a mean."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 4_000_000  # indices drawn at a time by the bootstrap: 32 MB


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
    position = torch.arange(n, k + 1, dtype=torch.float64, device=rewards.device)
    log_weight = _log_binomial(position - 1, n - 1) - _log_binomial(position.new_tensor(k), n)
    ordered = rewards.double().sort(dim=-1).values[..., n - 1 :]
    return (ordered * log_weight.exp()).sum(dim=-1).to(dtype)


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
    return expected_max(rewards if rewards.is_floating_point() else rewards.float(), n).clamp(0, 1)


def _log_binomial(total: Tensor, chosen: int) -> Tensor:
    part = total.new_tensor(chosen)
    return torch.lgamma(total + 1) - torch.lgamma(part + 1) - torch.lgamma(total - part + 1)


def win_rate(rewards: Tensor, against: Tensor) -> Tensor:
    """How often a sample beats a sample of the other side, over all k x m pairs; a tie counts one half.

        (1 / k m) sum_{i, j} ( 1{a_i > b_j} + 1/2 1{a_i = b_j} )

    Args:
        rewards: ``[..., k]``.
        against: ``[..., m]``, the same leading dimensions.

    Returns:
        ``[...]`` float64 in [0, 1]. ``win_rate(a, b) + win_rate(b, a) == 1``.

    Raises:
        ValueError: different leading dimensions, or a side without samples.
    """
    if rewards.shape[:-1] != against.shape[:-1] or 0 in (rewards.shape[-1], against.shape[-1]):
        raise ValueError(
            f"win_rate needs [..., k] and [..., m] with equal leading dimensions, got {tuple(rewards.shape)} "
            f"and {tuple(against.shape)}"
        )
    ordered = against.double().sort(dim=-1).values.contiguous()
    values = rewards.double().contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double().mean(dim=-1) / (2 * against.shape[-1])


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of ``values``.

    The values are drawn again with replacement, as many as there are, ``resamples`` times; the interval holds
    the middle ``level`` of the means. Pass one value a prompt (an average over its samples, say), because
    samples of one prompt are not independent observations of the population of prompts.

    Args:
        values: ``[n]``, one independent value each. A single value gives an interval of no width.
        level: the share of resampled means inside, in (0, 1).
        resamples: at least 1.
        seed: of the resampling; the same arguments give the same interval.

    Returns:
        (low, high), in units of ``values``.

    Raises:
        ValueError: ``values`` is empty or not one-dimensional, or another argument is out of its range.
    """
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"bootstrap_interval needs a non-empty [n], got {tuple(values.shape)}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"need 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    values = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    count = values.numel()
    rows = max(1, _CHUNK // count)
    means = [
        values[torch.randint(count, (min(rows, resamples - start), count), generator=generator)].mean(dim=-1)
        for start in range(0, resamples, rows)
    ]
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tail).tolist()
    return low, high
