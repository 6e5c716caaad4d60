"""Reward transforms: the host's own estimators, given other rewards."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from bond_plugin.algorithms.base import TransformInputs
from bond_plugin.host import flags, state
from bond_plugin.host.rewards import finite


def apply(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Put the transformed rewards in the place of the rewards, just before the host makes advantages of them.

    ``info["reward"]``, which the host logs, is the reward as it was.
    """
    transform = flags.transform(self.args)
    from bond_plugin.host import caching

    rewards = torch.cat([e.rewards.double() for e in experiences])
    prompts = list(itertools.chain.from_iterable(e.prompts for e in experiences))
    for reward, prompt in zip(rewards.tolist(), prompts, strict=True):
        finite(reward, prompt)

    # The host keeps log pi - log pi_ref of each token (its k1 estimate of the KL), not log pi_ref itself.
    kl = _sums([e.kl for e in experiences], experiences)
    log_probs = _sums([e.action_log_probs for e in experiences], experiences)

    # Each sample by itself: a row needs its own prompt's samples of the reference and nothing else.
    found = transform.transform(
        TransformInputs(
            rewards=rewards.unsqueeze(1),
            reference_rewards=caching.rewards_for(self.args, prompts),
            reference_log_probs=(log_probs - kl).unsqueeze(1),
        )
    )
    start = 0
    as_they_were = [e.rewards.float() for e in experiences]
    for e in experiences:
        e.rewards = found.rewards[start : start + len(e.sequences), 0].float()
        start += len(e.sequences)
    state.of(self).metrics |= {
        **found.metrics,
        "reward/policy": rewards.mean().item(),
        "bond/kl_ref": kl.mean().item(),
    }
    made = original(self, experiences)
    for e, reward in zip(experiences, as_they_were, strict=True):
        e.info["reward"] = reward  # the host has put there what it was given
    return made


def _sums(values: list[torch.Tensor], experiences: list[Any]) -> torch.Tensor:
    """The sum over each row's response tokens, ``[rows]`` float64. An empty response has 0."""
    masked = zip(values, experiences, strict=True)
    return torch.cat([torch.where(e.action_mask.bool(), v.double(), 0.0).sum(dim=-1) for v, e in masked])
