"""The backward divergence between the policy and Best-of-N, estimated from samples, with its gradient.

Everything is written in log-ratios to one reference distribution: log pi - log pi_ref of the policy, and
log pi_BoN - log pi_ref of the target (see :mod:`bond_plugin.bestofn.distribution`). The gradient is the expectation
of ``weight * grad log pi(y)``,

    KL(pi || pi_BoN)   y ~ pi   weight log pi(y) - log pi_BoN(y) - baseline

which is Eq. 14-15 of arXiv 2407.14622 before it is divided by N - 1. (The forward divergence needs no function: its
weight is -1 on samples of Best-of-N.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
