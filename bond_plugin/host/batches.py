"""Dynamic batches (``--train.dynamic_batch_enable``): an optimiser step in as few micro-batches as tokens allow.

The host makes them of about equal numbers of tokens, another number of them each step, with a loss that already is
a share of the whole step's. DeepSpeed therefore runs with one micro-batch a step and takes *every* backward pass for
the last one. Under ZeRO-1 and 2 each then begins the gradient anew, and all but the last micro-batch's are lost.
"""

from __future__ import annotations

import copy
from typing import Any

from bond_plugin.host import plan, weights


def mark(trainer: Any, model: Any, step: int) -> None:
    """Before a micro-batch's backward pass: say to DeepSpeed whether it is the last one of an optimiser step.

    Args:
        trainer: the host's trainer of the policy or of the critic.
        model: what it trains, prepared.
        step: number of the micro-batch in this epoch.
    """
    if trainer.args.train.dynamic_batch_enable:
        weights.engine_of(model).set_gradient_accumulation_boundary(ends_step(trainer, step))


def ends_step(trainer: Any, step: int) -> bool:
    """Whether the optimiser is to be called after this micro-batch (otherwise DeepSpeed decides when it steps)."""
    return not trainer.args.train.dynamic_batch_enable or bool(trainer.replay_buffer.dynamic_optimizer_step[step])


def divisor(strategy: Any) -> int:
    """By how much DeepSpeed divides the loss of each micro-batch."""
    return 1 if strategy.use_dynamic_batch else strategy.accumulated_gradient


def setup_dynamic_batch(original: Any, self: Any, strategy: Any) -> None:
    """The host counts the policy's samples where it cuts a rollout into steps; source samples are rows too."""
    args = strategy.args
    counted = copy.deepcopy(args)
    counted.rollout.n_samples_per_prompt = plan.of(args).rows.all
    counted.train.batch_size = strategy.train_batch_size  # rows, see `loss.setup_distributed`
    strategy.args = counted
    try:
        original(self, strategy)
    finally:
        strategy.args = args
