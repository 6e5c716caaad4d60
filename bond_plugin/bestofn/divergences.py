"""Divergences of distributions, whole or by the likelihood ratios of samples; in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def kl(first: Tensor, second: Tensor) -> Tensor:
    """``[...]``: KL(first || second) of log-probabilities ``[..., V]``."""
    return (first.exp() * (first - second)).sum(dim=-1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """``[...]``, in [0, log 2], of log-probabilities ``[..., V]``."""
    middle = torch.logaddexp(first, second) - math.log(2)
    return (kl(first, middle) + kl(second, middle)) / 2


def jensen_shannon_of_ratio(log_u: Tensor) -> Tensor:
    """f(u) = 1/2 (u log u - (u + 1) log((u + 1) / 2)), in nats, of log u."""
    log_u = log_u.clamp(max=20)  # beyond, u overflows
    u = log_u.exp()
    return ((u + 1) * math.log(2) - u * softplus(-log_u) - softplus(log_u)) / 2


#: f of D_f(p || q) = E_q[f(p / q)], of the logarithm of p / q.
GENERATORS = {"forward_kl": torch.neg, "jensen_shannon": jensen_shannon_of_ratio}


def transport(cost: Tensor, blur: float, iterations: int) -> Tensor:
    """``[K, K]``: the plan, exp(-cost / blur) with columns and rows scaled to sum to 1 in turn, in log space."""
    log_plan = -cost / blur
    for dim in (0, 1) * iterations:
        log_plan = log_plan - log_plan.logsumexp(dim=dim, keepdim=True)
    return log_plan.exp()
