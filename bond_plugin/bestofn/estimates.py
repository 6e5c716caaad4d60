"""Estimates from samples: the reward of Best-of-N, and win rates."""

from __future__ import annotations

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import quantiles


def expected_max(rewards: Tensor, n: int) -> Tensor:
    """The mean reward of Best-of-n, estimated without bias from k >= n independent samples.

    The average of the maximum over all subsets of n of the k samples (the U-statistic of the maximum). With
    r_(1) <= ... <= r_(k) the sorted rewards, r_(i) is the maximum of C(i-1, n-1) of the C(k, n) subsets:

        E[max of n] ~ sum_{i=n}^{k} C(i-1, n-1) / C(k, n) r_(i)

    The weights' error is below 1e-10 for k up to 10,000. Of 0/1 rewards it is pass@n, 1 - C(k - c, n) / C(k, n) with
    c right ones. ``[..., k]`` to ``[...]``, in the dtype of ``rewards`` (float32 for integers). Raises ValueError for
    n < 1, or n > k, where there is no unbiased estimate.
    """
    k = rewards.shape[-1] if rewards.dim() else 0
    if not 1 <= n <= k:
        raise ValueError(f"expected_max needs 1 <= n <= samples, got n = {n} with {k} samples")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return _over_subsets(rewards.double().sort(dim=-1).values, n).to(dtype)


def expected_at_max(rewards: Tensor, values: Tensor, n: int) -> Tensor:
    """The mean of ``values`` at the sample of Best-of-n, of equal rewards each equally likely; without bias.

    As :func:`expected_max`, which it is for ``values = rewards``: ``[..., k]`` both, 1 <= n <= k, to ``[...]``
    float64.
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


def max_credit(rewards: Tensor, n: int) -> Tensor:
    """What each of k samples did for the reward of Best-of-n: its mean times grad log pi has that one's gradient.

        n (mean of max r over the subsets of n samples that hold i  -  the same over those of the others)

    d E[max of n] = n E[max r(y_1 ... y_n) d log pi(y_1)], and the first mean is the U-statistic of that; the second
    does not depend on sample i, so that it is a baseline. For n < k the k numbers add up to zero. For n = k no subset
    of n leaves i out; the largest of the other k - 1 is the baseline then, and no number is negative. n = 1 is the
    reward less the mean of the others. In time O(k log k); the rewards count relative to the largest, so that nothing
    cancels where all are large and alike.

    ``[..., k]`` independent samples, k >= 2 and 1 <= n <= k, to ``[..., k]`` float64; the same for equal rewards.
    """
    k = rewards.shape[-1]
    ordered, index = rewards.double().sort(dim=-1)
    ordered = ordered - ordered[..., -1:]
    below = torch.arange(k, dtype=torch.float64, device=rewards.device)

    def share(total: Tensor, chosen: int, of: int) -> Tensor:
        """C(total, chosen) / C(k - 1, of), 0 where there is no such subset."""
        some = (total >= chosen) & (chosen >= 0)
        log = _log_binomial(total.clamp(min=chosen), max(chosen, 0)) - _log_binomial(total.new_tensor(k - 1.0), of)
        return torch.where(some, log.exp(), 0.0)

    left = min(n, k - 1)  # the size of the baseline's subsets
    # Of the others, those above sample i have one fewer below them than their place says.
    above = ordered * (share(below - 1, n - 2, n - 1) - share(below - 1, left - 1, left))
    under = ordered * share(below, left - 1, left)
    credit = ordered * share(below, n - 1, n - 1)
    credit = credit + (above.flip(-1).cumsum(dim=-1).flip(-1) - above) - (under.cumsum(dim=-1) - under)
    return n * credit.gather(-1, index.argsort(dim=-1))


def _log_binomial(total: Tensor, chosen: int) -> Tensor:
    part = total.new_tensor(chosen)
    return torch.lgamma(total + 1) - torch.lgamma(part + 1) - torch.lgamma(total - part + 1)


def win_rate(rewards: Tensor, against: Tensor) -> Tensor:
    """How often a sample beats a sample of the other side, over all k x m pairs; a tie counts one half.

        (1 / k m) sum_{i, j} ( 1{a_i > b_j} + 1/2 1{a_i = b_j} )

    ``[P, k]`` and ``[P, m]`` to ``[P]`` float64 in [0, 1].
    """
    below, not_above = quantiles(rewards, against)
    return (below + not_above).mean(dim=-1) / 2
