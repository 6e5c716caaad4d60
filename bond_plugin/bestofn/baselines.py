"""Baselines: what may be subtracted from the values of samples without changing the gradient they give on average.

A gradient is the mean of ``value * grad log pi(y)`` over samples y of the policy; a number that does not depend on y
leaves its expectation as it is, and can take most of its noise away (``B`` in Eq. 15 of arXiv 2407.14622).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASELINES: tuple[str, ...] = ("leave_one_out", "batch", "none")


def centre(values: Tensor, baseline: str) -> Tensor:
    """Subtract from each entry of ``[P, n]`` the mean of others, of those that ``baseline`` names.

    ``leave_one_out``: the prompt's other samples, n >= 2. ``batch``: all other samples. ``none``.
    """
    if baseline == "none":
        return values
    return values - leave_one_out_mean(values, dim=-1 if baseline == "leave_one_out" else None)


def leave_one_out_mean(values: Tensor, dim: int | None = None) -> Tensor:
    """For each entry the mean of the others along ``dim``, of all if that is ``None``; any shape.

    Raises ValueError for fewer than two entries.
    """
    count = values.numel() if dim is None else values.shape[dim]
    if count < 2:
        raise ValueError("a leave-one-out mean needs at least two values")
    total = values.sum() if dim is None else values.sum(dim=dim, keepdim=True)
    return (total - values) / (count - 1)


def leave_one_out_log_mean(logs: Tensor) -> Tensor:
    """``[P, n]``, n >= 2: for each entry the log of the mean of what the prompt's others are logs of."""
    n = logs.shape[-1]
    others = logs.unsqueeze(-2).masked_fill(torch.eye(n, dtype=torch.bool, device=logs.device), -math.inf)
    return others.logsumexp(dim=-1) - math.log(n - 1)


def group_normalised(rewards: Tensor) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300): (r - mean) / std over a prompt's samples; zeros where all are equal.

    ``[P, n]``, n >= 2. As in the host, the standard deviation is that of n - 1 degrees of freedom, and 1e-9 is added.
    """
    return (rewards - rewards.mean(dim=-1, keepdim=True)) / (rewards.std(dim=-1, keepdim=True) + 1e-9)
