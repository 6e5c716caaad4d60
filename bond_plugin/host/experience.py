"""From samples to advantages: rewards, log-probabilities under each set of weights, and the algorithm."""

from __future__ import annotations

from typing import Any

import torch

from bond_plugin.algorithms.base import AdvantageInputs
from bond_plugin.host import classifier
from bond_plugin.host.rewards import RewardError, finite
from bond_plugin.host.sampling import Rollout, Rollouts

#: Per-row mark in ``Experience.info``: 1 for companions. Taken out again before the host would log it.
COMPANION = "bond_companion"


class EngineGapError(RuntimeError):
    """Trainer and engine do not agree on the log-probabilities of the same tokens."""


@torch.no_grad()
def make_experience_batch(original: Any, self: Any, rollout_samples: Any) -> list[Any]:
    """The host's experience maker, for rollouts of ours; other rollouts go the host's way."""
    if not isinstance(rollout_samples, Rollout):
        return original(self, rollout_samples)
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    rollouts: Rollouts = self.bond
    algorithm, wants = rollouts.algorithm, rollouts.wants
    policy, companions = list(rollout_samples), rollout_samples.companions
    prompts = self.args.rollout.batch_size
    n = len(policy) // prompts
    _grouped(policy, prompts)
    _grouped(companions, prompts)

    _score(self, [*policy, *companions])
    for row in (*policy, *companions):
        row.rewards = row.rewards.float()
    apply_length_penalties([*policy, *companions], self.args)
    rewards = _finite_rewards(policy).reshape(prompts, n)
    companion_rewards = _finite_rewards(companions).reshape(prompts, -1)

    chosen = torch.zeros(prompts, 0, dtype=torch.long)
    if wants.trained_companions:
        chosen = algorithm.select(companion_rewards, rollouts.generator("select"))
    m = companion_rewards.shape[-1]
    rows: list[Any] = []
    for p in range(prompts):
        rows += policy[p * n : (p + 1) * n]
        rows += [companions[p * m + int(i)] for i in chosen[p]]

    # The host's forward pass of the policy; rewards are there already, so it computes log-probabilities only.
    critics, self.critic_model_group = self.critic_model_group, None  # a classifier is asked below, in its way
    try:
        experiences = self.make_experience(self.split_rollout_samples(rows))
    finally:
        self.critic_model_group = critics
    per_prompt = n + chosen.shape[-1]

    def by_prompt(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = values.reshape(prompts, per_prompt)
        return values[:, :n], values[:, n:]

    log_probs, companion_log_probs = by_prompt(sums([e.action_log_probs for e in experiences], experiences))
    under: dict[str, list[torch.Tensor]] = {"policy": [e.action_log_probs for e in experiences]}
    of_policy: dict[str, torch.Tensor] = {}
    for name in _others(algorithm):
        under[name] = rollouts.log_probs(name, experiences)
        of_policy[name], _ = by_prompt(sums(under[name], experiences))

    classifier_logits = reference_rewards = None
    if wants.classifier:
        classifier_logits, _ = by_prompt(torch.cat(rollouts.classifier_logits(experiences)).double())
    if wants.reward_cache:
        from bond_plugin.host import caching

        reference_rewards = caching.rewards_for(self.args, [policy[p * n].prompts[0] for p in range(prompts)])

    found = algorithm.advantages(
        AdvantageInputs(
            rewards=rewards,
            log_probs=log_probs,
            companion_rewards=companion_rewards,
            companion_log_probs=companion_log_probs,
            source_log_probs=of_policy[wants.source] if wants.source_log_probs else None,
            generator=rollouts.generator("advantages"),
            reference_rewards=reference_rewards,
            classifier_logits=classifier_logits,
        )
    )
    if not torch.isfinite(found.advantages).all():
        raise FloatingPointError("an advantage is not finite: a log-probability of the policy or anchor is not")

    metrics = rollouts.metrics
    metrics |= found.metrics
    metrics["reward/policy"] = rewards.mean().item()
    if m:
        metrics[f"reward/{wants.source}"] = companion_rewards.mean().item()
    if "reference" in of_policy:
        metrics["bond/kl_ref"] = (log_probs - of_policy["reference"]).mean().item()
    companion_rows = torch.zeros(prompts, per_prompt, dtype=torch.bool)
    companion_rows[:, n:] = True
    metrics |= _engine_gaps(experiences, under, wants.source, companion_rows.flatten(), algorithm.config)

    advantages = found.advantages
    if found.companion_advantages is not None:
        advantages = torch.cat([advantages, found.companion_advantages], dim=-1)
    controls: list[torch.Tensor | None] = [None] * len(experiences)
    if found.companion_baseline is not None:
        baseline = torch.zeros_like(advantages)
        baseline[:, n:] = found.companion_baseline
        controls = _controls(baseline.flatten(), under["policy"], under[wants.source], experiences)
    targets = torch.full((prompts, per_prompt), -1.0)
    if found.classifier_targets is not None:
        targets[:, :n] = found.classifier_targets
    rollouts.policy_samples = policy
    return _for_training(
        self, experiences, advantages.flatten(), companion_rows.flatten(), targets.flatten(), controls
    )


def _grouped(rows: list[Any], prompts: int) -> None:
    """Raises unless equally many consecutive rows answer each prompt: all that follows compares these."""
    size = len(rows) // prompts
    for start in range(0, len(rows), max(size, 1)):
        asked = {row.prompts[0] for row in rows[start : start + size]}
        if len(asked) != 1 or len(rows) % prompts:
            raise RuntimeError(f"samples of different prompts are mixed up: {sorted(asked)}")


def _others(algorithm: Any) -> list[str]:
    """Under which other weights the log-probabilities of a rollout are computed."""
    wants = algorithm.samples()
    wanted = {wants.source} if wants.source_log_probs else set()
    if algorithm.config.kl_ref:
        wanted.add("reference")
    return sorted(wanted)


def _score(maker: Any, rows: list[Any]) -> None:
    """Reward-model actors score here; Python files and servers have scored while sampling."""
    if rows[0].rewards is not None:
        return
    if maker.reward_model_group is None:
        raise RewardError("the samples came without a reward and there is no reward model")
    batches = maker.split_rollout_samples(rows)
    refs = maker._dispatch_forward(
        maker.reward_model_group,
        maker.args.train.colocate_all,
        sequences=[b.sequences for b in batches],
        attention_mask=[b.attention_mask for b in batches],
        pad_sequence=[True] * len(batches),
    )
    scores = torch.cat([score.flatten() for score in maker._flatten_results(refs, 1)])
    for row, score in zip(rows, scores, strict=True):
        row.rewards = score.reshape(1)
        row.info["reward"] = score.reshape(1)


def _finite_rewards(rows: list[Any]) -> torch.Tensor:
    """The rewards of single-sample rows as float64 ``[rows]``; raises with the prompt if one is no number."""
    values = [finite(float(row.rewards.flatten()[0]), row.prompts[0]) for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def sums(log_probs: list[torch.Tensor], experiences: list[Any]) -> torch.Tensor:
    """log pi(y) of each row: the sum over its response tokens, ``[rows]`` float64. An empty response has 0."""
    return torch.cat(
        [
            torch.where(e.action_mask.bool(), lp.double(), 0.0).sum(dim=-1)
            for lp, e in zip(log_probs, experiences, strict=True)
        ]
    )


def _controls(
    baseline: torch.Tensor, policy: list[torch.Tensor], source: list[torch.Tensor], experiences: list[Any]
) -> list[torch.Tensor]:
    """:attr:`LossInputs.control` of each experience: ``baseline`` has one number a row, in their order."""
    found = []
    rows = baseline.split([len(e.action_mask) for e in experiences])
    for part, log_probs, under, e in zip(rows, policy, source, experiences, strict=True):
        ratio = torch.where(e.action_mask.bool(), log_probs - under, 0.0).clamp(-20, 20).exp()
        found.append((part.unsqueeze(-1) * ratio * e.action_mask).float())
    return found


def _engine_gaps(
    experiences: list[Any],
    under: dict[str, list[torch.Tensor]],
    source: str,
    companion: torch.Tensor,
    config: Any,
) -> dict[str, float]:
    """Compare the engine's log-probabilities with the trainer's, for the policy and for the companions' source.

    ``vllm_kl`` is the host's measure, the mean of log pi_engine - log pi_trainer over tokens; the gaps are
    means of its absolute value.
    """

    def differences(trainer: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        parts = []
        start = 0
        for e, lp in zip(experiences, trainer, strict=True):
            size = len(e.sequences)
            mask = e.action_mask.bool() & rows[start : start + size].unsqueeze(-1)
            parts.append((e.rollout_log_probs - lp)[mask])
            start += size
        return torch.cat(parts).double()

    found: dict[str, float] = {}
    policy = differences(under["policy"], ~companion)
    found["vllm_kl"] = policy.mean().item()
    found["bond/engine_gap_policy"] = policy.abs().mean().item()
    if companion.any() and source in under:
        other = differences(under[source], companion)
        found[f"vllm_kl_{source}"] = other.mean().item()
        found[f"bond/engine_gap_{source}"] = other.abs().mean().item()
        # How far the policy is from what the companions were drawn from: must exceed the gap once it moved.
        found[f"bond/{source}_policy_gap"] = differences(under["policy"], companion).abs().mean().item()
    for name, gap in found.items():
        if name.startswith("bond/engine_gap") and not gap <= config.max_engine_gap:
            raise EngineGapError(
                f"{name} is {gap:.3f} nats a token, more than --bond.max_engine_gap {config.max_engine_gap}: the "
                "vLLM engine does not hold the weights it should, or computes very differently from the trainer"
            )
    return found


def _for_training(
    maker: Any,
    experiences: list[Any],
    advantages: torch.Tensor,
    companion: torch.Tensor,
    targets: torch.Tensor,
    controls: list[torch.Tensor | None],
) -> list[Any]:
    """One experience a data-parallel rank, all of the same number of rows, prompts in order."""
    from openrlhf.trainer.ppo_utils.experience import (
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )

    start = 0
    rows: list[Any] = []
    for e, control in zip(experiences, controls, strict=True):
        size = len(e.sequences)
        part = slice(start, start + size)
        e.advantages = advantages[part].float().unsqueeze(-1) * e.action_mask
        e.returns = control  # the host reads them for its critic alone
        e.kl = e.values = e.base_action_log_probs = None
        e.info = {
            "reward": e.rewards.float(),
            COMPANION: companion[part].float(),
        }
        if maker.critic_model_group is not None:
            e.info[classifier.TARGET] = targets[part].float()
        rows += split_experience_batch(e)
        start += size
    rows = remove_padding_in_sequences(rows)
    args = maker.args
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    dealt = []
    share = len(rows) // ranks
    for rank in range(ranks):
        batch = make_experience_batch(rows[rank * share : (rank + 1) * share])
        batch.info = {
            name: torch.stack([torch.as_tensor(value) for value in values]) for name, values in batch.info.items()
        }
        dealt.append(batch)
    return dealt
