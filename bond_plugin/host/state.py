"""What is kept between the host's calls where it trains: one object, under one name, ``bond``.

The host's trainer, sampler and experience maker share it. (Kept weights live in the training workers, see
:mod:`bond_plugin.host.weights`.) And what goes to training with each row of an experience.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bond_plugin.offline.engine import seed

if TYPE_CHECKING:
    from bond_plugin.host.metrics import MetricsFile
    from bond_plugin.host.sampling import Engines

#: Where ``Experience.info`` holds one :class:`Row` a row. Taken out before the host would log it.
ROWS = "bond_rows"


@dataclass(frozen=True)
class Row:
    """What training must know of a response that the host has no place for.

    Attributes:
        from_source: it is a source sample, not one of the policy.
        classifier_target: what the classifier is to say of it, in [0, 1]; ``None``: it is not trained on it.
    """

    from_source: bool
    classifier_target: float | None = None


@dataclass
class State:
    """Of one run.

    Attributes:
        args: the run's.
        step: optimiser steps' rollouts so far, on which all seeds depend.
        metrics: what the step that is being made reports, by name.
        timings: the same, of names ``timing/...``: parts of the host's own timings, which it adds up.
        log: ``metrics.jsonl``, in the trainer's process.
        engines: where source samples are drawn.
        policy_samples, source_samples: of the step, where there are both: n and m a prompt, prompt by prompt.
        source_rewards: ``[P, m]`` float64 of the step's source samples; ``None`` without.
        log_probs: under other weights than the policy's, by their name: ``[B, A]`` for each experience; rows are
            NaN where a report alone wants some of them.
        hidden: the teacher's hidden states, ``[tokens, H]`` a row, for each experience; empty unless wanted.
        warned: whether it was said that few samples do the work.
    """

    args: Any
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    log: MetricsFile | None = None
    engines: Engines | None = None
    policy_samples: list[Any] = field(default_factory=list)
    source_samples: list[Any] = field(default_factory=list)
    source_rewards: Tensor | None = None
    log_probs: dict[str, list[Tensor]] = field(default_factory=dict)
    hidden: list[list[Tensor]] = field(default_factory=list)
    warned: bool = False

    def seed(self, *parts: object) -> int:
        """A seed of this step that no sharding and no resumption changes."""
        return seed(self.args.train.seed, self.step, *parts)

    def generator(self, purpose: str) -> torch.Generator:
        """A source of randomness with such a seed."""
        return torch.Generator().manual_seed(self.seed(purpose))


def share(trainer: Any) -> State:
    """Give a trainer a new state, and its experience maker and sampler the same."""
    state = State(trainer.args)
    for owner in filter(None, (trainer, trainer.experience_maker, getattr(trainer, "samples_generator", None))):
        owner.bond = state
    return state


def of(owner: Any) -> State:
    """The state of one of these. The sampler of an asynchronous run, in another process, has one of its own."""
    if not hasattr(owner, "bond"):
        owner.bond = State(owner.args)
    return owner.bond
