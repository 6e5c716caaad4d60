"""Advantages of our algorithms, and rewards of transforms, in the host's experience maker.

Rollouts, reward models, penalties, statistics, log-probabilities, replay and loss are the host's: what is ours stands
behind :func:`compute_advantages_and_returns`. What algorithms that draw from other weights do before and after it
is in :mod:`bond_plugin.host.experience`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bond_plugin import registry
from bond_plugin.algorithms import AdvantageInputs, Needs, assemble
from bond_plugin.host import plan, state
from bond_plugin.host.experience import Batch, for_training
from bond_plugin.host.logits import HIDDEN
from bond_plugin.host.rewards import finite
from bond_plugin.offline import make_cache


class EngineGapError(RuntimeError):
    """Trainer and engine do not agree on the log-probabilities of the same tokens."""


@torch.no_grad()
def compute_advantages_and_returns(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Let the host do its part (rewards, penalties, statistics, returns), and put our advantages in.

    The rows of a rollout with source samples have been through what of it they need.

    Raises:
        RewardError: a reward is no number, whatever the estimator.
        EngineGapError: see :func:`engine_gaps`.
        ContractError: see :func:`bond_plugin.algorithms.assemble.advantages`.
    """
    args, run, kept = self.args, plan.of(self.args), state.of(self)
    for e in experiences:
        for prompt, reward in zip(e.prompts, e.rewards.flatten().tolist(), strict=True):
            finite(reward, prompt)
    if run.transform is not None:
        return _transformed(original, self, experiences)
    if run.algorithm is None:
        return original(self, experiences)
    needs, n = run.needs, run.rows.policy
    if not needs.source_samples:
        experiences = original(self, experiences)
    batch = Batch(experiences, run.rows.all)
    rewards = batch.rows([e.rewards for e in experiences])[:, :n]
    under = {"policy": batch.tokens([e.action_log_probs for e in experiences])}
    under |= {name: batch.tokens(values) for name, values in kept.log_probs.items()}
    metrics = {"reward/policy": rewards.mean().item()}
    if "reference" in under:
        # Over responses; of those that a report alone wants, some have none.
        totals = (under["policy"] - under["reference"])[:, :n].sum(dim=-1)
        metrics["bond/kl_ref"] = totals.nanmean().item()
        if run.kl_from_few:
            del under["reference"]
    if all(e.rollout_log_probs is not None for e in experiences):
        drawn = batch.tokens([e.rollout_log_probs for e in experiences])
        if not needs.offline:
            # An asynchronous run's samples are an earlier policy's: there the gap is no sign of a broken engine.
            limit = None if args.train.async_enable else run.algorithm.config.max_engine_gap
            metrics |= engine_gaps(drawn, under, batch.in_order(batch.filled), n, needs.source, limit)
        if args.train.async_enable or run.stored:
            under["behaviour"] = drawn
        if run.stored and not needs.offline:  # beside the policy's, whose engines differ by rounding
            under["behaviour"] = torch.cat([under["policy"][:, :n], drawn[:, n:]], dim=1)
        del drawn
    inputs = AdvantageInputs(
        rewards,
        rewards[:, :0] if kept.source_rewards is None else kept.source_rewards,
        under,
        kept.generator("advantages"),
        reference_rewards=_cached(args, batch, needs),
        classifier_logits=batch.rows([e.values for e in experiences])[:, :n] if needs.classifier else None,
        step=kept.step,
    )
    found = assemble.advantages(run.algorithm, inputs)
    batch.spread(found.advantages)
    kept.metrics |= {**found.metrics, **metrics}
    for i, e in enumerate(experiences):
        e.returns = None  # which a critic would be trained on
        if kept.hidden:
            e.info[HIDDEN] = kept.hidden[i]
        # What a loss of the algorithm's own compares with, in the place of the reference's log-probabilities.
        if run.algorithm.policy_loss == registry.OWN_LOSS and run.in_slot in needs.log_probs:
            e.base_action_log_probs = kept.log_probs[run.in_slot][i]
    if needs.source_samples:
        return for_training(args, batch, found.classifier_targets)
    _warn_of_few(kept, run.algorithm)
    return experiences


def engine_gaps(
    drawn: torch.Tensor,
    under: dict[str, torch.Tensor],
    filled: torch.Tensor,
    n: int,
    source: str,
    limit: float | None,
) -> dict[str, float]:
    """Compare the engine's log-probabilities with the trainer's: the policy's samples under the policy, and those of
    the source, if there are any, under what they were drawn from.

    ``vllm_kl`` is the host's measure, the mean of log pi_engine - log pi_trainer over tokens; the gap is the mean of
    its absolute value. How far the policy is from the source is told too: it must exceed the gap once it has moved.

    Args:
        drawn, filled: ``[P, n + f, A]``, the engine's, and which of them are tokens.
        under: the trainer's, by the weights.
        n: rows of the policy a prompt.
        source: the name of the other rows' weights.
        limit: how large a gap may be, in nats a token; ``None``: as large as it likes.

    Raises:
        EngineGapError: one is larger.
    """
    found: dict[str, float] = {}
    for name, rows in {"policy": slice(0, n), source: slice(n, None)}.items():
        if name not in under or not drawn[:, rows].numel():
            continue
        apart = (drawn - under[name])[:, rows][filled[:, rows]]
        gap = apart.abs().mean().item()
        if limit is not None and not gap <= limit:
            raise EngineGapError(
                f"bond/engine_gap_{name} is {gap:.3f} nats a token, more than --bond.max_engine_gap {limit}: the "
                "vLLM engine does not hold the weights it should, or computes very differently from the trainer"
            )
        suffix = "" if name == "policy" else f"_{name}"
        found |= {f"vllm_kl{suffix}": apart.mean().item(), f"bond/engine_gap_{name}": gap}
        if name == source:
            away = (drawn - under["policy"])[:, rows][filled[:, rows]]
            found[f"bond/{source}_policy_gap"] = away.abs().mean().item()
    return found


def _cached(args: Any, batch: Batch, needs: Needs) -> torch.Tensor | None:
    """The cached rewards of a batch's prompts, if they are wanted."""
    return make_cache.of(args).rewards(batch.prompts, args.bond.cache_samples) if needs.reward_cache else None


def _transformed(original: Any, self: Any, experiences: list[Any]) -> list[Any]:
    """Put transformed rewards in the place of the rewards, just before the host makes advantages of them.

    ``info["reward"]``, which the host logs, is the reward as it was.
    """
    run, kept = plan.of(self.args), state.of(self)
    batch = Batch(experiences, run.rows.policy)
    rewards = batch.rows([e.rewards for e in experiences])
    kl = batch.tokens([e.kl for e in experiences])
    under = {"policy": batch.tokens([e.action_log_probs for e in experiences])}
    if "reference" in run.needs.log_probs:
        # The host keeps log pi - log pi_ref of each token (its k1 estimate of the KL), not log pi_ref itself.
        under["reference"] = under["policy"] - kl
    known = _cached(self.args, batch, run.needs)
    inputs = AdvantageInputs(rewards, rewards[:, :0], under, kept.generator("transform"), known)
    found = run.transform.transform(inputs)
    kept.metrics |= {**found.metrics, "reward/policy": rewards.mean().item()}
    if self.args.algo.kl.init_coef > 0:
        kept.metrics["bond/kl_ref"] = kl.sum(dim=-1).mean().item()
    as_they_were = [e.rewards.float() for e in experiences]
    transformed = batch.in_turn(assemble.checked("rewards", found.rewards, rewards.shape)).float()
    for e, values in zip(experiences, transformed.split([len(e.sequences) for e in experiences]), strict=True):
        e.rewards = values
    made = original(self, experiences)
    for e, reward in zip(experiences, as_they_were, strict=True):
        e.info["reward"] = reward  # the host has put there what it was given
    return made


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
