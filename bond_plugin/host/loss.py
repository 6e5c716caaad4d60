"""The policy loss in the training workers: one mean over prompts, whatever the split.

DeepSpeed averages gradients over data-parallel ranks and over the micro-batches of a step. A row's loss is
therefore scaled by ranks x micro-batches / prompts, and rows sum up to the mean over the prompts of the
whole optimiser step.
"""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bond_plugin import registry
from bond_plugin.algorithms.assemble import PolicyLoss, weighed_loss
from bond_plugin.algorithms.base import LossInputs
from bond_plugin.host import checks, hooks, logits, plan, weights
from bond_plugin.host.state import ROWS


def setup_distributed(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """In each worker, before its model is made. DeepSpeed counts every row it trains on, source samples too;
    ``--train.batch_size`` those of the policy alone.
    """
    logits.limit_to(self.args)
    rows = plan.of(self.args).rows
    if rows.selected:
        self.train_batch_size = self.args.train.batch_size // rows.policy * rows.all
    if os.environ.get("WORLD_SIZE") == "1":
        # The host chose a free port when this worker began, seconds ago: another process may have it by now. Alone it
        # needs none that others know.
        os.environ["MASTER_PORT"] = "0"
    original(self, *args, **kwargs)


class PromptMeanLoss(nn.Module):
    """Stands where the host's ``PolicyLoss`` stands, with its signature, and calls a registered loss.

    Args:
        loss: from the group ``openrlhf.policy_losses``.
        args: the run's arguments.
        micro_batches: micro-batches of an optimiser step on this rank, over whose losses DeepSpeed takes the mean.

    Attributes:
        known: of the micro-batch that comes next, ``from_source`` (without it there are none) and ``under`` of its
            :class:`LossInputs`.
        on_logits: where its losses on logits will be, if the algorithm has such.
        row_losses: of the last micro-batch, ``[B]``.
    """

    def __init__(self, loss: PolicyLoss, args: SimpleNamespace, micro_batches: int) -> None:
        super().__init__()
        run = plan.of(args)
        n = run.rows.policy
        self._loss, self._micro_batches, self.rows = loss, micro_batches, run.rows
        self._prompts = args.train.batch_size // n
        low, high = args.actor.eps_clip_low_high
        one_step = args.train.max_epochs == 1 and args.rollout.batch_size * n == args.train.batch_size
        self._settings = {"on_policy": one_step and not run.needs.offline, "clip_low": low, "clip_high": high}
        self._stored = run.stored > 0
        self._values = hooks.policy_loss_values()
        self.known: dict[str, Any] = {}
        self.on_logits: logits.OnLogits | None = None
        self.row_losses: Tensor | None = None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        **_totals: Any,
    ) -> tuple[Any, ...]:
        none = torch.zeros(len(log_probs), dtype=torch.bool, device=log_probs.device)
        known = {"from_source": none, "under": {}, **self.known}
        if self._stored and rollout_log_probs is not None:
            known["under"] = {**known["under"], "behaviour": rollout_log_probs}
        if self.on_logits is not None:
            values = self.on_logits.values.to(log_probs)
            known["token_losses"] = torch.zeros_like(log_probs).masked_scatter(action_mask.bool(), values)
        inputs = LossInputs(
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            advantages=advantages,
            mask=action_mask,
            **known,
            **self._settings,
        )
        found = weighed_loss(self._loss, inputs, self.rows)
        self.row_losses = found.row_loss.detach()
        loss = found.row_loss.sum() * (dp_size * self._micro_batches / self._prompts)
        mask = action_mask.to(log_probs.dtype)
        moved = ((old_log_probs - log_probs.detach()) * mask).sum() / mask.sum().clamp(min=1)
        # The last two are of a correction that this loss does not make; the host has the second from 0.11.2 on.
        return (loss, found.clip_fraction, moved, None, None)[: self._values]


def training_step(
    original: Any, self: Any, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None
) -> dict:
    """One micro-batch, and the anchor after an optimiser step (DeepSpeed decides which calls are one).

    A loss of ours is handed what it needs to know of the rows, and reported as it is meant.
    """
    mark(self, self.actor, step)
    known, hidden = experience.info.pop(ROWS, None), experience.info.pop(logits.HIDDEN, None)
    loss, kept = self.actor_loss_fn, weights.of(self.actor)
    ours = isinstance(loss, PromptMeanLoss)
    if ours:
        run, compared = plan.of(self.args), experience.base_action_log_probs
        loss.known = {} if compared is None else {"under": {run.in_slot: compared}}
        if known is not None:
            from_source = torch.tensor([row.from_source for row in known], device=experience.sequences.device)
            loss.known["from_source"] = from_source
        loss.on_logits = None if hidden is None else logits.OnLogits(run.algorithm.token_losses, torch.cat(hidden))
        self.actor.bond_on_logits = loss.on_logits
    status = original(self, experience, kl_ctl, step, loss_batch_info)
    if kept is not None:
        kept.after_optimizer_step()
    if not ours:
        return status
    self.actor.bond_on_logits = None
    # The host averages over rows; the mean over prompts of a step is rows / prompts times that.
    status["metrics"]["bond/loss"] = loss.row_losses * loss.rows.all
    status["weights"]["bond/loss"] = "sample"
    if known is not None:
        # Likewise, "reward" on the host's bar is to be the mean over the policy's samples alone.
        reward = torch.where(from_source.cpu(), 0.0, status["metrics"]["reward"].cpu())
        status["metrics"]["reward"] = reward * loss.rows.all / loss.rows.policy
    return status


def ppo_train(original: Any, self: Any, kl_ctl: float) -> dict:
    """One rollout's training, by a registered policy loss if that is wanted: the order of rows depends on seed and
    step alone; measure the anchor after it.
    """
    kept, name = weights.of(self.actor), self.args.actor.policy_loss_type
    if name not in checks.HOST_LOSSES and not isinstance(self.actor_loss_fn, PromptMeanLoss):
        loss = registry.policy_loss(name, plan.of(self.args).algorithm)
        self.actor_loss_fn = PromptMeanLoss(loss, self.args, divisor(self.strategy))
    if kept is not None:
        torch.manual_seed(self.args.train.seed + self.actor.model.global_steps)
    status = original(self, kl_ctl)
    if kept is not None and "anchor" in kept:
        status["bond/anchor_distance"] = kept.anchor_distance()
    return status


# Dynamic batches (``--train.dynamic_batch_enable``): an optimiser step in as few micro-batches as tokens allow.
#
# The host makes them of about equal numbers of tokens, another number of them each step, with a loss that already is
# a share of the whole step's. DeepSpeed therefore runs with one micro-batch a step and takes *every* backward pass
# for the last. Under ZeRO-1 and 2 each then begins the gradient anew, and all but the last micro-batch's are lost.


def mark(trainer: Any, model: Any, step: int) -> None:
    """Before the backward pass of an epoch's micro-batch ``step``: tell DeepSpeed whether it ends an optimiser step.

    Of the host's trainer of the policy or of the critic, and of what that trains, prepared.
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
    counted = copy.copy(strategy)
    counted.args = copy.deepcopy(strategy.args)
    counted.args.rollout.n_samples_per_prompt = plan.of(strategy.args).rows.all
    counted.args.train.batch_size = strategy.train_batch_size  # rows, see `setup_distributed`
    original(self, counted)
