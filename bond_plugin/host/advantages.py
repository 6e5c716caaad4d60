"""Advantages of algorithms that draw nothing but the policy's samples, and rewards of transforms.

Rollouts, reward models, penalties, statistics, log-probabilities, replay and loss are the host's: what is ours stands
behind :func:`compute_advantages_and_returns`. Algorithms that draw from other weights have a way of their own
(:mod:`bond_plugin.host.experience`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bond_plugin.host import plan, state, transform
from bond_plugin.host.experience import Batch, assembled, engine_gap, keep_for_loss, of_step
from bond_plugin.host.rewards import finite


@torch.no_grad()
def compute_advantages_and_returns(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Let the host do its part (rewards, penalties, statistics, returns), and put our advantages in.

    Raises:
        RewardError: a reward is no number, whatever the estimator.
    """
    run = plan.of(self.args)
    if run.transform is not None:
        return transform.apply(original, self, experiences)
    algorithm = run.algorithm
    if algorithm is None:
        for e in experiences:  # elsewhere `Batch.rewards` looks at them
            for prompt, reward in zip(e.prompts, e.rewards.flatten().tolist(), strict=True):
                finite(reward, prompt)
        return original(self, experiences)
    experiences = original(self, experiences)
    batch = Batch(experiences, self.args.rollout.n_samples_per_prompt)
    found = assembled(self, algorithm, batch, batch.n)
    batch.spread(found.advantages)
    for e in experiences:
        e.returns = None  # which a critic would be trained on
    keep_for_loss(self, experiences)

    metrics = state.of(self).metrics
    metrics |= {**found.metrics, **of_step(self, found.inputs, batch)}
    if all(e.rollout_log_probs is not None for e in experiences) and not run.needs.offline:
        rows = torch.ones(batch.size, dtype=torch.bool)
        # An asynchronous run's samples are an earlier policy's: there the gap is no sign of a broken engine.
        limit = None if self.args.train.async_enable else algorithm.config.max_engine_gap
        trainer = [e.action_log_probs for e in experiences]
        metrics |= engine_gap(experiences, trainer, rows, "policy", limit)
    _warn_of_few(state.of(self), algorithm)
    return experiences


@torch.no_grad()
def cumulative_returns(
    original: Any, self: Any, rewards: torch.Tensor, action_mask: torch.Tensor | None, gamma: float
) -> torch.Tensor:
    """The host's sums of what is still to come, ``[B, T]``, to the last bit, without its loop over tokens.

    That loop, a Python step a token and micro-batch, is nearly all that the controller does on long responses.
    """
    if gamma != 1.0 or rewards.dtype != torch.float32 or rewards.device.type != "cpu":
        return original(self, rewards, action_mask, gamma)
    counted = rewards if action_mask is None else action_mask * rewards
    # NumPy adds one after the other in float32, as the loop does; torch.cumsum does not. The loop begins with 0.
    backwards = np.add.accumulate((counted + 0.0).numpy()[:, ::-1], axis=1)
    return torch.from_numpy(backwards[:, ::-1].copy())


def _warn_of_few(kept: state.State, algorithm: Any) -> None:
    """Say once that the weights have degenerated."""
    share, least = kept.metrics.get("bond/ess"), getattr(algorithm.config, "min_ess", 0.0)
    if share is None or share >= least or kept.warned:
        return
    kept.warned = True
    print(
        f"bond: warning: bond/ess is {share:.2f}, below --bond.min_ess {least}: the policy is so far from the "
        f"anchor that {share:.0%} of a prompt's samples do the work. Let the anchor follow faster (a larger "
        "--bond.eta, or a smaller --bond.anchor_interval), draw samples of it too (--bond.n_anchor_samples), or "
        "compare with a --bond.reward_cache",
        flush=True,
    )
