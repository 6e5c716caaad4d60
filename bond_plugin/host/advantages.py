"""Advantages of our algorithms, and rewards of transforms, in the host's experience maker.

Rollouts, reward models, penalties, statistics, log-probabilities, replay and loss are the host's: what is ours stands
behind :func:`compute_advantages_and_returns`. Around it is what a rollout with source samples goes through.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from bond_plugin import registry
from bond_plugin.algorithms import AdvantageInputs, Needs, assemble
from bond_plugin.host import plan, state
from bond_plugin.host.logits import HIDDEN
from bond_plugin.host.rewards import EXTRA, finite
from bond_plugin.host.state import ROWS, Row
from bond_plugin.offline import make_cache


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
        self.order = self.places.argsort()
        given = [prompt for e in experiences for prompt in e.prompts]
        prompts = [given[row] for row in self.order]
        self.prompts = prompts[::n]
        if len(prompts) % n or prompts != [prompt for prompt in self.prompts for _ in range(n)]:
            raise RuntimeError(f"samples of different prompts are mixed up: {sorted(set(prompts))}")

    @functools.cached_property
    def masks(self) -> list[torch.Tensor]:
        """Which tokens of each experience are a response's, ``[B, A]`` bool."""
        return [e.action_mask.bool() for e in self.experiences]

    @functools.cached_property
    def filled(self) -> torch.Tensor:
        """Which of ``[P n, A']`` are tokens, from the left, as the rows stand in the experiences."""
        lengths = torch.cat([mask.sum(dim=-1) for mask in self.masks])
        return torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to rows, ``[P n, ...]`` as they stand in the experiences, by prompt: ``[P, n, ...]``.

        That is another order where micro-batches are made by tokens.
        """
        return values[self.order].unflatten(0, (-1, self.n))

    def in_turn(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`in_order`."""
        return values.flatten(0, 1)[self.places]

    def rows(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a row, ``[B]`` for each experience, as ``[P, n]`` float64."""
        return self.in_order(torch.cat([v.flatten() for v in values]).double())

    def tokens(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One number a token, ``[B, A]`` for each experience, as ``[P, n, A']``: response tokens from the left."""
        flat = torch.cat([v[mask] for v, mask in zip(values, self.masks, strict=True)]).double()
        return self.in_order(flat.new_zeros(self.filled.shape).masked_scatter_(self.filled, flat))

    def spread(self, advantages: torch.Tensor) -> None:
        """Give each experience its ``advantages``, ``[P, n, A']``: of response tokens from the left."""
        flat = self.in_turn(advantages)[self.filled].float()
        parts = flat.split([int(mask.sum()) for mask in self.masks])
        for e, mask, part in zip(self.experiences, self.masks, parts, strict=True):
            e.advantages = torch.zeros(mask.shape).masked_scatter_(mask, part)


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
        n, source: rows of the policy a prompt, and the name of the other rows' weights.
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


# Rollouts with source samples.


@torch.no_grad()
def make_experience_batch(original: Any, self: Any, rollout_samples: Any) -> list[Any]:
    """The host's experience maker. Of a rollout with source samples it gets the rows, which are scored already."""
    run, kept = plan.of(self.args), state.of(self)
    if not run.needs.source_samples:
        return original(self, rollout_samples)
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    policy, source = rollout_samples, kept.source_samples
    n, m, prompts = run.rows.policy, run.needs.source_samples, len(policy) // run.rows.policy
    if policy[0].rewards is None:  # Python files and servers have scored while sampling
        _score(self, [*policy, *source])
    for sample in (*policy, *source):
        sample.rewards = sample.rewards.float()
    apply_length_penalties([*policy, *source], self.args)
    scored = [finite(float(sample.rewards.flatten()[0]), sample.prompts[0]) for sample in source]
    kept.source_rewards = torch.tensor(scored, dtype=torch.float64).reshape(prompts, m)
    kept.policy_samples = policy
    kept.metrics |= _of_reward(policy)
    kept.metrics[f"reward/{run.needs.source}"] = kept.source_rewards.mean().item()

    samples = [policy[p * n : (p + 1) * n] + source[p * m : (p + 1) * m] for p in range(prompts)]
    places = assemble.select(run.algorithm, n, kept.source_rewards, kept.generator("select"))
    return original(self, [samples[p][place] for p in range(prompts) for place in places[p].tolist()])


def _of_reward(samples: list[Any]) -> dict[str, float]:
    """What the user's reward gives beside itself, as the host logs it: means over the samples."""
    names = {name for sample in samples for name in sample.info if name.startswith(EXTRA) or name == "score"}
    found = {name: [float(s.info[name].flatten()[0]) for s in samples if name in s.info] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _score(maker: Any, rows: list[Any]) -> None:
    """By the reward-model actors."""
    batches = maker.split_rollout_samples(rows)
    refs = maker._dispatch_forward(
        maker.reward_model_group,
        maker.args.train.colocate_all,
        sequences=[b.sequences for b in batches],
        attention_mask=[b.attention_mask for b in batches],
        pad_sequence=[True] * len(batches),
    )
    scores = torch.cat([score.flatten() for score in maker._flatten_results(refs, 1)])
    places = [place for b in batches for place in b.index]
    for place, score in zip(places, scores, strict=True):
        rows[place].rewards = rows[place].info["reward"] = score.reshape(1)


def for_training(args: Any, batch: Batch, classifier_targets: torch.Tensor | None) -> list[Any]:
    """One experience a data-parallel rank, all of the same number of rows, in the order of a batch with advantages.

    The classifier's targets, ``[P, n]``, are of the policy's samples alone.
    """
    from openrlhf.trainer.ppo_utils.experience import make_experience_batch, split_experience_batch

    n = plan.of(args).rows.policy
    known = [
        Row(i >= n, float(classifier_targets[p, i]) if classifier_targets is not None and i < n else None)
        for p, i in (divmod(place, batch.n) for place in batch.places.tolist())
    ]
    hidden = [row for e in batch.experiences for row in e.info.get(HIDDEN, ())]
    rows: list[Any] = []
    for e in batch.experiences:
        e.kl = e.values = None
        e.info = {}
        rows += split_experience_batch(e)
    # The ranks take the padding away themselves.
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    share = len(rows) // ranks
    dealt = []
    for rank in range(ranks):
        part = slice(rank * share, (rank + 1) * share)
        e = make_experience_batch(rows[part])
        e.info = {"reward": e.rewards.float(), ROWS: known[part]} | ({HIDDEN: hidden[part]} if hidden else {})
        dealt.append(e)
    return dealt
