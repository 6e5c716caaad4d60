"""Reward transforms: the host's own estimators, given other rewards."""

from __future__ import annotations

from typing import Any

from bond_plugin.algorithms.base import TransformInputs
from bond_plugin.host import plan, state
from bond_plugin.host.experience import Batch


def apply(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Put the transformed rewards in the place of the rewards, just before the host makes advantages of them.

    ``info["reward"]``, which the host logs, is the reward as it was.
    """
    from bond_plugin.offline import make_cache

    batch = Batch(experiences, 1)  # a row needs its own prompt's samples of the reference and nothing else
    rewards = batch.rewards()
    # The host keeps log pi - log pi_ref of each token (its k1 estimate of the KL), not log pi_ref itself.
    kl = batch.tokens([e.kl for e in experiences]).sum(dim=-1)
    log_probs = batch.tokens([e.action_log_probs for e in experiences]).sum(dim=-1)
    found = plan.of(self.args).transform.transform(
        TransformInputs(
            rewards=rewards,
            reference_rewards=make_cache.rewards_for(self.args, batch.prompts),
            reference_log_probs=log_probs - kl,
        )
    )
    state.of(self).metrics |= {
        **found.metrics,
        "reward/policy": rewards.mean().item(),
        "bond/kl_ref": kl.mean().item(),
    }
    as_they_were = [e.rewards.float() for e in experiences]
    transformed = batch.in_turn(found.rewards).float().split([len(e.sequences) for e in experiences])
    for e, values in zip(experiences, transformed, strict=True):
        e.rewards = values
    made = original(self, experiences)
    for e, reward in zip(experiences, as_they_were, strict=True):
        e.info["reward"] = reward  # the host has put there what it was given
    return made
