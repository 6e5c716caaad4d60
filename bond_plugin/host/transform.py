"""Reward transforms: the host's own estimators, given other rewards."""

from __future__ import annotations

from typing import Any

from bond_plugin.algorithms import assemble
from bond_plugin.algorithms.base import AdvantageInputs
from bond_plugin.host import plan, state
from bond_plugin.host.experience import Batch


def apply(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Put the transformed rewards in the place of the rewards, just before the host makes advantages of them.

    ``info["reward"]``, which the host logs, is the reward as it was.
    """
    from bond_plugin.offline import make_cache

    run = plan.of(self.args)
    batch = Batch(experiences, run.rows.policy)
    rewards = batch.rows([e.rewards for e in experiences])
    kl = batch.tokens([e.kl for e in experiences])
    under = {"policy": batch.tokens([e.action_log_probs for e in experiences])}
    if "reference" in run.needs.log_probs:
        # The host keeps log pi - log pi_ref of each token (its k1 estimate of the KL), not log pi_ref itself.
        under["reference"] = under["policy"] - kl
    cached = None
    if run.needs.reward_cache:
        cached = make_cache.of(self.args).rewards(batch.prompts, self.args.bond.cache_samples)
    found = run.transform.transform(
        AdvantageInputs(rewards, rewards[:, :0], under, state.of(self).generator("transform"), cached)
    )
    transformed = assemble.checked("rewards", found.rewards, rewards.shape)
    metrics = state.of(self).metrics
    metrics |= {**found.metrics, "reward/policy": rewards.mean().item()}
    if self.args.algo.kl.init_coef > 0:
        metrics["bond/kl_ref"] = kl.sum(dim=-1).mean().item()
    as_they_were = [e.rewards.float() for e in experiences]
    by_experience = batch.in_turn(transformed).float().split([len(e.sequences) for e in experiences])
    for e, values in zip(experiences, by_experience, strict=True):
        e.rewards = values
    made = original(self, experiences)
    for e, reward in zip(experiences, as_they_were, strict=True):
        e.info["reward"] = reward  # the host has put there what it was given
    return made
