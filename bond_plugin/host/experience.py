"""Rollouts with source samples on their way through the host's experience maker, and the rows of any rollout."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bond_plugin.algorithms import assemble
from bond_plugin.host import plan, state
from bond_plugin.host.logits import HIDDEN
from bond_plugin.host.rewards import EXTRA, finite
from bond_plugin.host.state import ROWS, Row


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
    """One experience a data-parallel rank, all of the same number of rows, in the order of the experiences.

    Args:
        args: the run's.
        batch: with advantages.
        classifier_targets: ``[P, n]``, of the policy's samples alone; ``None`` without a classifier.
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
