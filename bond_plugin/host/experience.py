"""From samples to advantages: rewards, log-probabilities under each set of weights, and the algorithm."""

from __future__ import annotations

from typing import Any

import torch

from bond_plugin.algorithms.base import AdvantageInputs
from bond_plugin.host import classifier
from bond_plugin.host.rewards import RewardError, finite
from bond_plugin.host.sampling import Rollout, Rollouts
from bond_plugin.offline.engine import seed

#: Per-row mark in ``Experience.info``: 1 for companions. Taken out again before the host would log it.
COMPANION = "bond_companion"


class EngineGapError(RuntimeError):
    """Trainer and engine do not agree on the log-probabilities of the same tokens."""


class Batch:
    """The rows of a rollout's experiences, as the prompts stand in the rollout, ``n`` rows each.

    Args:
        experiences: the host's, with ``index``: the places of their rows in the rollout.
        n: rows a prompt, consecutive in the rollout.

    Raises:
        RuntimeError: rows of different prompts are mixed up, or a prompt has fewer rows.
    """

    def __init__(self, experiences: list[Any], n: int) -> None:
        self.experiences, self.n = experiences, n
        self._places = torch.tensor([place for e in experiences for place in e.index])
        self.size = len(self._places)
        self.order = self._places.argsort()
        given = [prompt for e in experiences for prompt in e.prompts]
        prompts = [given[row] for row in self.order]
        self.prompts = prompts[::n]
        if self.size % n or prompts != [prompt for prompt in self.prompts for _ in range(n)]:
            raise RuntimeError(f"samples of different prompts are mixed up: {sorted(set(prompts))}")

    def rows(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a row, ``[B]`` for each experience, as ``[P, n]`` float64."""
        return torch.cat([v.flatten() for v in values]).double()[self.order].reshape(-1, self.n)

    def tokens(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a token, ``[B, A]`` for each experience, as ``[P, n, A']``: response tokens from the left."""
        rows: list[torch.Tensor] = []
        for value, e in zip(values, self.experiences, strict=True):
            mask = e.action_mask.bool()
            rows += value.double()[mask].split(mask.sum(dim=-1).tolist())
        padded = torch.nn.utils.rnn.pad_sequence([rows[i] for i in self.order], batch_first=True)
        return padded.reshape(-1, self.n, padded.shape[-1])

    def in_turn(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to rows, ``[P, n, ...]``, as the rows stand in the experiences, ``[P n, ...]``.

        That is another order than the rollout's where micro-batches are made by tokens.
        """
        return values.flatten(0, 1)[self._places]

    def spread(self, advantages: torch.Tensor) -> None:
        """Give each experience its ``advantages``, from one number a row ``[P, n]`` or a token ``[P, n, A']``.

        Raises:
            FloatingPointError: one is not finite.
        """
        if not torch.isfinite(advantages).all():
            raise FloatingPointError("an advantage is not finite: a log-probability of the policy or anchor is not")
        ordered = self.in_turn(advantages)
        start = 0
        for e in self.experiences:
            mask = e.action_mask.bool()
            part = ordered[start : start + len(mask)].float()
            start += len(mask)
            e.advantages = torch.zeros(mask.shape)
            if part.dim() == 1:
                part = part.unsqueeze(-1).expand(-1, max(mask.shape[-1], 1))
            e.advantages[mask] = part[torch.arange(part.shape[-1]) < mask.sum(dim=-1, keepdim=True)]


def inputs_of(
    maker: Any,
    algorithm: Any,
    batch: Batch,
    under: dict[str, list[torch.Tensor]],
    n: int,
    companion_rewards: torch.Tensor | None = None,
    classifier_logits: torch.Tensor | None = None,
) -> AdvantageInputs:
    """What an algorithm is given of a rollout.

    Args:
        maker: the host's experience maker.
        batch: its rows; the first ``n`` of a prompt are the policy's.
        under: log-probabilities by weights, ``policy`` among them, ``[B, A]`` for each experience.
        companion_rewards: ``[P, m]``, of all companions; ``None`` without.
        classifier_logits: as there.
    """
    wants, args = algorithm.samples(), maker.args
    policy = batch.tokens(under["policy"])
    totals = policy.sum(dim=-1)
    ratios = {name: policy - batch.tokens(values) for name, values in under.items() if name != "policy"}
    rewards = batch.rows([e.rewards for e in batch.experiences])[:, :n]
    if companion_rewards is None:
        companion_rewards = rewards[:, :0]
    reference_rewards = behaviour = None
    if wants.reward_cache:
        from bond_plugin.offline import make_cache

        reference_rewards = make_cache.rewards_for(args, batch.prompts)
    drawn = [e.rollout_log_probs for e in batch.experiences]
    if args.train.async_enable and all(each is not None for each in drawn):
        behaviour = (totals - batch.tokens(drawn).sum(dim=-1))[:, :n]
    source = ratios[wants.source] if wants.source_log_probs else None
    step = getattr(maker, "bond_step", 0)
    return AdvantageInputs(
        rewards=rewards,
        log_probs=totals[:, :n],
        companion_rewards=companion_rewards,
        companion_log_probs=totals[:, n:],
        source_log_probs=None if source is None else (totals - source.sum(dim=-1))[:, :n],
        generator=torch.Generator().manual_seed(seed(args.train.seed, step, "advantages")),
        reference_rewards=reference_rewards,
        classifier_logits=classifier_logits,
        source_log_ratios=source,
        reference_log_ratios=ratios.get("reference"),
        behaviour_log_ratios=behaviour,
    )


def of_step(inputs: AdvantageInputs) -> dict[str, float]:
    """What is shown of every step, whatever the algorithm."""
    found = {"reward/policy": inputs.rewards.mean().item()}
    if inputs.reference_log_ratios is not None:
        n = inputs.rewards.shape[-1]
        found["bond/kl_ref"] = inputs.reference_log_ratios[:, :n].sum(dim=-1).mean().item()
    return found


@torch.no_grad()
def make_experience_batch(original: Any, self: Any, rollout_samples: Any) -> list[Any]:
    """The host's experience maker, for rollouts with companions; other rollouts go the host's way."""
    if not isinstance(rollout_samples, Rollout):
        return original(self, rollout_samples)
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    rollouts: Rollouts = self.bond
    algorithm, wants = rollouts.algorithm, rollouts.wants
    policy, companions = list(rollout_samples), rollout_samples.companions
    prompts = self.args.rollout.batch_size
    n, m = len(policy) // prompts, len(companions) // prompts
    if any(companions[i].prompts != policy[i // m * n].prompts for i in range(len(companions))):
        raise RuntimeError("samples of different prompts are mixed up")

    _score(self, [*policy, *companions])
    for row in (*policy, *companions):
        row.rewards = row.rewards.float()
    apply_length_penalties([*policy, *companions], self.args)
    _finite_rewards(policy)
    companion_rewards = _finite_rewards(companions).reshape(prompts, m)

    chosen = torch.zeros(prompts, 0, dtype=torch.long)
    if wants.trained_companions:
        chosen = algorithm.select(companion_rewards, rollouts.generator("select"))
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
    batch = Batch(experiences, n + chosen.shape[-1])
    under = {"policy": [e.action_log_probs for e in experiences], **getattr(self, "bond_log_probs", {})}
    logits = None
    if wants.classifier:
        logits = batch.rows(rollouts.classifier_logits(experiences))[:, :n]

    inputs = inputs_of(self, algorithm, batch, under, n, companion_rewards, logits)
    found = algorithm.advantages(inputs)
    companion_rows = torch.zeros(prompts, batch.n, dtype=torch.bool)
    companion_rows[:, n:] = True
    companion_rows = batch.in_turn(companion_rows)
    metrics = rollouts.metrics
    metrics |= {**found.metrics, **of_step(inputs)}
    metrics[f"reward/{wants.source}"] = companion_rewards.mean().item()
    metrics |= _engine_gaps(experiences, under, wants.source, companion_rows, algorithm.config)

    advantages = found.advantages
    if found.companion_advantages is not None:
        if found.companion_advantages.dim() != advantages.dim():  # one number a token beside one a row
            sizes = inputs.source_log_ratios.shape[-1]
            wide = found.companion_advantages.unsqueeze(-1).expand(-1, -1, sizes)
            advantages = torch.cat([advantages, wide], dim=1)
        else:
            advantages = torch.cat([advantages, found.companion_advantages], dim=1)
    batch.spread(advantages)
    targets = torch.full((prompts, batch.n), -1.0)
    if found.classifier_targets is not None:
        targets[:, :n] = found.classifier_targets
    rollouts.policy_samples = policy
    return _for_training(self, experiences, companion_rows, batch.in_turn(targets))


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
    places = (place for b in batches for place in b.index)
    for row, score in zip((rows[place] for place in places), scores, strict=True):
        row.rewards = score.reshape(1)
        row.info["reward"] = score.reshape(1)


def _finite_rewards(rows: list[Any]) -> torch.Tensor:
    """The rewards of single-sample rows as float64 ``[rows]``; raises with the prompt if one is no number."""
    values = [finite(float(row.rewards.flatten()[0]), row.prompts[0]) for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def engine_gap(
    experiences: list[Any], trainer: list[torch.Tensor], rows: torch.Tensor, name: str, limit: float | None
) -> dict[str, float]:
    """Compare the engine's log-probabilities with the trainer's under the weights ``name``, on some rows.

    ``vllm_kl`` is the host's measure, the mean of log pi_engine - log pi_trainer over tokens; the gap is the mean of
    its absolute value.

    Raises:
        EngineGapError: the gap is more than ``limit``, in nats a token.
    """
    differences = _differences(experiences, trainer, rows)
    gap = differences.abs().mean().item()
    if limit is not None and not gap <= limit:
        raise EngineGapError(
            f"bond/engine_gap_{name} is {gap:.3f} nats a token, more than --bond.max_engine_gap {limit}: the "
            "vLLM engine does not hold the weights it should, or computes very differently from the trainer"
        )
    suffix = "" if name == "policy" else f"_{name}"
    return {f"vllm_kl{suffix}": differences.mean().item(), f"bond/engine_gap_{name}": gap}


def _differences(experiences: list[Any], trainer: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """log pi_engine - log pi_trainer of each response token of some rows (``[rows]`` bool), float64."""
    parts = []
    for e, log_probs, kept in zip(
        experiences, trainer, rows.split([len(e.sequences) for e in experiences]), strict=True
    ):
        mask = e.action_mask.bool() & kept.unsqueeze(-1)
        parts.append((e.rollout_log_probs - log_probs)[mask])
    return torch.cat(parts).double()


def _engine_gaps(
    experiences: list[Any],
    under: dict[str, list[torch.Tensor]],
    source: str,
    companion: torch.Tensor,
    config: Any,
) -> dict[str, float]:
    """The gaps of the policy and of what the companions were drawn from."""
    limit = config.max_engine_gap
    found = engine_gap(experiences, under["policy"], ~companion, "policy", limit)
    if companion.any() and source in under:
        found |= engine_gap(experiences, under[source], companion, source, limit)
        # How far the policy is from what the companions were drawn from: must exceed the gap once it moved.
        away = _differences(experiences, under["policy"], companion).abs().mean().item()
        found[f"bond/{source}_policy_gap"] = away
    return found


def _for_training(maker: Any, experiences: list[Any], companion: torch.Tensor, targets: torch.Tensor) -> list[Any]:
    """One experience a data-parallel rank, all of the same number of rows, in the order of ``experiences``."""
    from openrlhf.trainer.ppo_utils.experience import (
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )

    start = 0
    rows: list[Any] = []
    for e in experiences:
        size = len(e.sequences)
        part = slice(start, start + size)
        e.kl = e.values = e.returns = e.base_action_log_probs = None
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
