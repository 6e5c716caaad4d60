"""Rewards that turn Best-of-N distillation into policy gradients, and strict orders to compute them on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def strict_ranks(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Replace rewards by ranks in which nothing is tied any more; ties are ordered uniformly at random.

    Theorem 1 of BOND (arXiv 2407.14622) assumes that the reward orders generations strictly. Its proof
    needs *some* strict order among equals; a random one (rather than the position in the batch) favours no
    sample.

    Args:
        rewards: ``[..., k]``, the rewards of the samples that are compared with each other. Finite.
        generator: source of the random order among equals. ``None`` uses torch's global one.

    Returns:
        ``[..., k]`` int64: a permutation of 0 … k-1 along the last dimension, increasing in the reward.

    Raises:
        ValueError: a reward is NaN or infinite: such values have no place in an order.
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("strict_ranks needs finite rewards")
    tie_break = torch.rand(rewards.shape, generator=generator, dtype=torch.float64)
    shuffled = tie_break.argsort(dim=-1)
    by_reward = rewards.detach().cpu().gather(-1, shuffled).argsort(dim=-1, stable=True)
    return shuffled.gather(-1, by_reward).argsort(dim=-1).to(rewards.device)


def jbond_reward(rewards: Tensor, anchor_rewards: Tensor) -> Tensor:
    """The crude log-quantile of J-BOND, Eq. 17 of arXiv 2407.14622.

    With two anchor samples, ``-log 16`` where the policy's sample is worse than both, else 0. It is the
    cheapest reward whose expectation follows log p_<=: E[r] = -log 16 (1 - p)^2 equals log p at p = 1/2
    (appendix A.4). For m anchor samples the same argument gives ``-2^m log 2``, which is ``-log 16`` at the
    paper's m = 2; other m are our extension.

    Args:
        rewards: ``[..., n]`` of the policy's samples.
        anchor_rewards: ``[..., m]`` of the anchor's samples for the same prompt.

    Returns:
        ``[..., n]`` in the dtype of ``rewards`` (float32 for integers), in nats.

    Raises:
        ValueError: fewer than two anchor samples (Best-of-1 is the anchor itself).
    """
    m = anchor_rewards.shape[-1]
    if m < 2:
        raise ValueError(f"jbond_reward needs at least 2 anchor samples a prompt, got {m}")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    below_all = rewards < anchor_rewards.amin(dim=-1, keepdim=True)
    return below_all.to(dtype) * -(2.0**m * math.log(2.0))


def leave_one_out_mean(values: Tensor) -> Tensor:
    """For each entry the mean of all the others: a baseline that does not depend on the entry itself.

    Args:
        values: any shape, at least two entries.

    Returns:
        The same shape.

    Raises:
        ValueError: fewer than two entries.
    """
    count = values.numel()
    if count < 2:
        raise ValueError("a leave-one-out mean needs at least two values")
    return (values.sum() - values) / (count - 1)
