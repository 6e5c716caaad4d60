"""From samples to advantages: rewards, log-probabilities under each set of weights, and the algorithm."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bond_plugin import registry
from bond_plugin.algorithms import assemble
from bond_plugin.algorithms.base import AdvantageInputs, Algorithm
from bond_plugin.host import plan, state
from bond_plugin.host.logits import HIDDEN
from bond_plugin.host.rewards import EXTRA, RewardError, finite
from bond_plugin.host.rows import ROWS, Row
from bond_plugin.host.sampling import Rollout


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
        self.places = torch.tensor([place for e in experiences for place in e.index])
        self.size = len(self.places)
        self.order = self.places.argsort()
        given = [prompt for e in experiences for prompt in e.prompts]
        prompts = [given[row] for row in self.order]
        self.prompts = prompts[::n]
        if self.size % n or prompts != [prompt for prompt in self.prompts for _ in range(n)]:
            raise RuntimeError(f"samples of different prompts are mixed up: {sorted(set(prompts))}")

    @functools.cached_property
    def lengths(self) -> list[list[int]]:
        """Response tokens of each row of each experience."""
        return [e.action_mask.bool().sum(dim=-1).tolist() for e in self.experiences]

    def rows(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a row, ``[B]`` for each experience, as ``[P, n]`` float64."""
        return torch.cat([v.flatten() for v in values]).double()[self.order].reshape(-1, self.n)

    def rewards(self) -> torch.Tensor:
        """``[P, n]`` float64.

        Raises:
            RewardError: one is no number; the message has its prompt.
        """
        found = self.rows([e.rewards for e in self.experiences])
        for prompt, of_prompt in zip(self.prompts, found.tolist(), strict=True):
            for reward in of_prompt:
                finite(reward, prompt)
        return found

    def tokens(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a token, ``[B, A]`` for each experience, as ``[P, n, A']``: response tokens from the left."""
        found = torch.zeros(self.size, max(map(max, self.lengths)), dtype=torch.float64)
        for value, e, lengths in zip(values, self.experiences, self.lengths, strict=True):
            rows = value.masked_select(e.action_mask.bool()).split(lengths)
            for place, row in zip(e.index, rows, strict=True):
                found[place, : len(row)] = row
        return found.reshape(len(self.prompts), self.n, -1)

    def in_turn(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to rows, ``[P, n, ...]``, as the rows stand in the experiences, ``[P n, ...]``.

        That is another order than the rollout's where micro-batches are made by tokens.
        """
        return values.flatten(0, 1)[self.places]

    def spread(self, advantages: torch.Tensor) -> None:
        """Give each experience its ``advantages``, ``[P, n, A']``: of response tokens from the left."""
        rows = advantages.flatten(0, 1)
        for e, lengths in zip(self.experiences, self.lengths, strict=True):
            kept = [rows[place, :length] for place, length in zip(e.index, lengths, strict=True)]
            mask = e.action_mask.bool()
            e.advantages = torch.zeros(mask.shape).masked_scatter_(mask, torch.cat(kept).float())


def under_weights(maker: Any, experiences: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities by weights, ``policy`` among them: ``[B, A]`` for each experience.

    Without those that are there for a report only.
    """
    few = plan.of(maker.args).kl_from_few
    whole = {name: values for name, values in state.of(maker).log_probs.items() if not (few and name == "reference")}
    return {"policy": [e.action_log_probs for e in experiences], **whole}


def assembled(
    maker: Any,
    algorithm: Algorithm,
    batch: Batch,
    n: int,
    source_rewards: torch.Tensor | None = None,
    classifier_logits: torch.Tensor | None = None,
) -> assemble.Assembled:
    """The advantages of a rollout.

    Args:
        maker: the host's experience maker.
        algorithm: see there.
        batch: the rows; the first ``n`` of a prompt are the policy's.
        n: see there.
        source_rewards: ``[P, m]``, of all source samples; ``None`` without.
        classifier_logits: ``[P, n]``, or ``None``.

    Raises:
        ContractError: see :func:`bond_plugin.algorithms.assemble.advantages`.
        RewardError: see :meth:`Batch.rewards`.
    """
    args = maker.args
    under = {name: batch.tokens(values) for name, values in under_weights(maker, batch.experiences).items()}
    drawn = [e.rollout_log_probs for e in batch.experiences]
    stored = plan.of(args).stored
    if (args.train.async_enable or stored) and all(each is not None for each in drawn):
        under["behaviour"] = batch.tokens(drawn)
        if stored and not algorithm.needs().offline:
            under["behaviour"][:, :n] = under["policy"][:, :n]  # the engines' differ by rounding
    rewards = batch.rewards()[:, :n]
    reference_rewards = None
    if algorithm.needs().reward_cache:
        from bond_plugin.offline import make_cache

        reference_rewards = make_cache.rewards_for(args, batch.prompts)
    inputs = AdvantageInputs(
        rewards,
        rewards[:, :0] if source_rewards is None else source_rewards,
        under,
        state.of(maker).generator("advantages"),
        reference_rewards=reference_rewards,
        classifier_logits=classifier_logits,
        step=state.of(maker).step,
    )
    return assemble.advantages(algorithm, inputs)


def of_step(maker: Any, inputs: AdvantageInputs, batch: Batch) -> dict[str, float]:
    """What is shown of every step, whatever the algorithm."""
    found = {"reward/policy": inputs.rewards.mean().item()}
    totals = []  # of log pi - log pi_initial, a response each
    if "reference" in inputs.under:
        totals = [inputs.log_ratio("reference").flatten()]
    else:
        for e, log_probs in zip(batch.experiences, state.of(maker).log_probs.get("reference", ()), strict=False):
            scored = ~log_probs[:, 0].isnan()
            ratios = (e.action_log_probs.double() - log_probs.double()).where(e.action_mask.bool(), 0.0)
            totals.append(ratios[scored].sum(dim=-1))
    if totals:
        found["bond/kl_ref"] = torch.cat(totals).mean().item()
    return found


@torch.no_grad()
def make_experience_batch(original: Any, self: Any, rollout_samples: Any) -> list[Any]:
    """The host's experience maker, for rollouts with source samples; other rollouts go the host's way."""
    if not isinstance(rollout_samples, Rollout):
        return original(self, rollout_samples)
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    kept = state.of(self)
    algorithm = kept.engines.algorithm
    needs = algorithm.needs()
    policy, source = list(rollout_samples), rollout_samples.source_samples
    prompts = self.args.rollout.batch_size
    n, m = len(policy) // prompts, len(source) // prompts
    if any(source[i].prompts != policy[i // m * n].prompts for i in range(len(source))):
        raise RuntimeError("samples of different prompts are mixed up")

    _score(self, [*policy, *source])
    for sample in (*policy, *source):
        sample.rewards = sample.rewards.float()
    apply_length_penalties([*policy, *source], self.args)
    scored = [finite(float(sample.rewards.flatten()[0]), sample.prompts[0]) for sample in source]
    source_rewards = torch.tensor(scored, dtype=torch.float64).reshape(prompts, m)

    samples = [policy[p * n : (p + 1) * n] + source[p * m : (p + 1) * m] for p in range(prompts)]
    places = assemble.select(algorithm, n, source_rewards, kept.generator("select"))
    rows = [samples[p][place] for p in range(prompts) for place in places[p].tolist()]

    # The host's forward passes; rewards are there already, and in the critic's slot can only be the classifier.
    experiences = self.make_experience(self.split_rollout_samples(rows))
    batch = Batch(experiences, places.shape[-1])
    logits = batch.rows([e.values for e in experiences])[:, :n] if needs.classifier else None
    found = assembled(self, algorithm, batch, n, source_rewards, logits)
    batch.spread(found.advantages)

    from_source = assemble.Rows(n, needs.selected_samples).from_source(prompts)
    kept.policy_samples = policy
    kept.metrics |= _of_reward(policy)
    kept.metrics |= {**found.metrics, **of_step(self, found.inputs, batch)}
    kept.metrics[f"reward/{needs.source}"] = source_rewards.mean().item()
    kept.metrics |= _engine_gaps(
        experiences, under_weights(self, experiences), needs.source, batch.in_turn(from_source), algorithm.config
    )
    targets = found.classifier_targets
    known = [
        Row(from_source=i >= n, classifier_target=float(targets[p, i]) if targets is not None and i < n else None)
        for p in range(prompts)
        for i in range(batch.n)
    ]
    keep_for_loss(self, experiences)
    return _for_training(self.args, experiences, [known[place] for place in batch.places.tolist()])


def keep_for_loss(maker: Any, experiences: list[Any]) -> None:
    """What a loss of the algorithm's own compares with, log-probabilities in the host's place for the reference's."""
    run = plan.of(maker.args)
    for e, hidden in zip(experiences, state.of(maker).hidden, strict=False):
        e.info[HIDDEN] = hidden
    if run.algorithm.policy_loss == registry.OWN_LOSS and run.in_slot in run.needs.log_probs:
        for e, log_probs in zip(experiences, state.of(maker).log_probs[run.in_slot], strict=True):
            e.base_action_log_probs = log_probs


def _of_reward(samples: list[Any]) -> dict[str, float]:
    """What the user's reward gives beside itself, as the host logs it: means over the samples."""
    names = {name for sample in samples for name in sample.info if name.startswith(EXTRA) or name == "score"}
    found = {name: [float(s.info[name].flatten()[0]) for s in samples if name in s.info] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in found.items()}


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
        parts.append((e.rollout_log_probs - log_probs).masked_select(mask))
    return torch.cat(parts).double()


def _engine_gaps(
    experiences: list[Any],
    under: dict[str, list[torch.Tensor]],
    source: str,
    from_source: torch.Tensor,
    config: Any,
) -> dict[str, float]:
    """The gaps of the policy and of what the source samples were drawn from."""
    limit = config.max_engine_gap
    found = engine_gap(experiences, under["policy"], ~from_source, "policy", limit)
    if from_source.any() and source in under:
        found |= engine_gap(experiences, under[source], from_source, source, limit)
        # How far the policy is from the source: must exceed the gap once it moved.
        away = _differences(experiences, under["policy"], from_source).abs().mean().item()
        found[f"bond/{source}_policy_gap"] = away
    return found


def _for_training(args: Any, experiences: list[Any], known: list[Row]) -> list[Any]:
    """One experience a data-parallel rank, all of the same number of rows, in the order of ``experiences``.

    Args:
        args: the run's.
        experiences: with advantages.
        known: of each of their rows.
    """
    from openrlhf.trainer.ppo_utils.experience import make_experience_batch, split_experience_batch

    rows: list[Any] = []
    for e in experiences:
        e.kl = e.values = e.returns = None
        hidden = {HIDDEN: e.info[HIDDEN]} if HIDDEN in e.info else {}
        e.info = {"reward": e.rewards.float(), ROWS: known[len(rows) : len(rows) + len(e.sequences)], **hidden}
        rows += split_experience_batch(e)
    # The ranks take the padding away themselves.
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    share = len(rows) // ranks
    dealt = []
    for rank in range(ranks):
        batch = make_experience_batch(rows[rank * share : (rank + 1) * share])
        batch.info["reward"] = torch.stack(batch.info["reward"])
        dealt.append(batch)
    return dealt
