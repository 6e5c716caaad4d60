"""Divergences between the policy and Best-of-N, estimated from samples, with their gradients.

Everything is written in log-ratios to one reference distribution: log pi - log pi_ref of the policy, and
log pi_BoN - log pi_ref of the target (see :mod:`bond_plugin.bestofn.distribution`). The gradient of each
divergence is the expectation of ``weight * grad log pi(y)``:

    forward    KL(pi_BoN || pi)   y ~ pi_BoN    weight -1
    backward   KL(pi || pi_BoN)   y ~ pi        weight log pi(y) - log pi_BoN(y) - baseline
    Jeffreys   (1 - beta) forward + beta backward                          (Eq. 11 of arXiv 2407.14622)

The backward gradient is Eq. 14-15 of arXiv 2407.14622 before it is divided by N - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["leave_one_out", "batch", "none"]
BASELINES: tuple[str, ...] = ("leave_one_out", "batch", "none")


@dataclass(frozen=True)
class Divergence:
    """A divergence estimated from samples.

    Attributes:
        values: one a sample; their mean estimates the divergence, in nats.
        weights: one a sample, without gradient; the mean of ``weights * grad log pi`` estimates its gradient.
    """

    values: Tensor
    weights: Tensor

    def surrogate(self, log_probs: Tensor) -> Tensor:
        """A scalar whose gradient is the estimate of the divergence's gradient.

        Args:
            log_probs: log pi of the samples, with gradient, in the shape of ``weights``.
        """
        return (self.weights * log_probs).mean()


def forward_kl(log_ratio: Tensor, log_target_ratio: Tensor) -> Divergence:
    """KL(pi_BoN || pi) from samples of Best-of-N.

    Args:
        log_ratio: any shape, log pi(y) - log pi_ref(y).
        log_target_ratio: the same shape, log pi_BoN(y) - log pi_ref(y).

    Returns:
        :class:`Divergence` in that shape. Both parts are unbiased.
    """
    return Divergence((log_target_ratio - log_ratio).detach(), -torch.ones_like(log_ratio))


def backward_kl(log_ratio: Tensor, log_target_ratio: Tensor, baseline: Baseline = "leave_one_out") -> Divergence:
    """KL(pi || pi_BoN) from samples of the policy.

    Args:
        log_ratio: ``[P, n]``, log pi(y) - log pi_ref(y), n samples a prompt.
        log_target_ratio: ``[P, n]``, log pi_BoN(y) - log pi_ref(y).
        baseline: ``leave_one_out``: the mean over the prompt's other samples, n >= 2. ``batch``: the mean over
            all other samples. ``none``. A baseline that does not contain the sample itself leaves the
            expectation of the gradient as it is.

    Returns:
        :class:`Divergence` ``[P, n]``. Unbiased as far as ``log_target_ratio`` is: a log of an estimated
        quantile is not (the laboratory reports by how much).

    Raises:
        ValueError: too few samples for the baseline, or an unknown one.
    """
    values = (log_ratio - log_target_ratio).detach()
    return Divergence(values, centre(values, baseline))


def jeffreys(forward: Divergence, backward: Divergence, beta: float) -> Tensor:
    """J_beta = (1 - beta) KL(pi_BoN || pi) + beta KL(pi || pi_BoN), Eq. 11 of arXiv 2407.14622.

    Returns:
        ``[]``, in nats.

    Raises:
        ValueError: beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    return (1 - beta) * forward.values.mean() + beta * backward.values.mean()


def centre(values: Tensor, baseline: str) -> Tensor:
    """Subtract from each entry of ``[P, n]`` the mean of others, of those that ``baseline`` names.

    Raises:
        ValueError: too few samples for the baseline, or an unknown one.
    """
    if baseline == "none":
        return values
    if baseline == "batch":
        return values - leave_one_out_mean(values)
    if baseline == "leave_one_out":
        return values - leave_one_out_mean(values, dim=-1)
    raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")


def leave_one_out_mean(values: Tensor, dim: int | None = None) -> Tensor:
    """For each entry the mean of the others: a baseline that does not depend on the entry itself.

    Args:
        values: any shape.
        dim: the dimension whose others count; ``None`` takes all entries.

    Returns:
        The same shape.

    Raises:
        ValueError: fewer than two entries.
    """
    count = values.numel() if dim is None else values.shape[dim]
    if count < 2:
        raise ValueError("a leave-one-out mean needs at least two values")
    total = values.sum() if dim is None else values.sum(dim=dim, keepdim=True)
    return (total - values) / (count - 1)
