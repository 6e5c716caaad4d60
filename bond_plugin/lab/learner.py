"""Training on the laboratory's problem, through what the host runs: :mod:`bond_plugin.algorithms.assemble`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bond_plugin import registry
from bond_plugin.algorithms import assemble
from bond_plugin.algorithms.base import AdvantageInputs, LossInputs, RewardTransform
from bond_plugin.algorithms.logits import Head, Logits
from bond_plugin.bestofn.baselines import centre
from bond_plugin.lab.methods import Method
from bond_plugin.lab.problem import (
    LENGTH,
    MASK,
    RESPONSES,
    VOCABULARY,
    EnumerablePolicy,
    Goal,
    Point,
    Problem,
    next_token_log_probs,
    token_log_probs,
)

#: The N of the Best-of-N of the reference that is the teacher.
TEACHER = 4

_EVERY = 5  # steps between two measurements


@dataclass(frozen=True)
class Training:
    """How a policy is trained.

    The learning rate falls to 0 along a cosine over the run, or from each renewal of a periodic anchor to the next;
    under a moving average, whose target never rests, it stays.
    """

    steps: int = 160  # optimiser steps (Adam)
    lr: float = 0.25  # learning rate
    prompts: int = 256  # P, copies of the one problem in a batch
    samples: int = 8  # n, samples of the policy a prompt
    cached: int = 300  # M, rewards of the reference a prompt that are drawn before training, where they are wanted
    seed: int = 0  # of everything that is drawn


@dataclass(frozen=True)
class Run:
    """What :func:`train` returns."""

    trajectory: list[Point]  # exact measurements, the first before any step and the last at the end
    rounds: list[Point]  # one at the end of each period of a periodic anchor

    @property
    def end(self) -> Point:
        return self.trajectory[-1]

    @property
    def closest(self) -> Point:
        """The point with the smallest KL(pi || pi_BoN): for methods whose target moves on past it."""
        return min(self.trajectory, key=lambda point: point.kl_to_bon)


class Learner:
    """A method at work on a policy: it draws batches, and holds what training holds beside the policy.

    That is the anchor (a moving average or a periodic copy of the parameters), the cached rewards of the
    reference, and the classifier of quantiles: one logit a response, which is the same for every prompt as
    all prompts are copies of one. A teacher is Best-of-:data:`TEACHER` of the reference.
    """

    def __init__(self, problem: Problem, method: Method, policy: EnumerablePolicy, training: Training) -> None:
        self.problem, self.method, self.policy, self.training = problem, method, policy, training
        self.generator = torch.Generator().manual_seed(training.seed)
        self.needs = method.needs()
        self.rows = assemble.Rows(training.samples, self.needs.selected_samples)
        self.anchor = policy.parameters.detach().clone()
        self.classifier = torch.zeros(len(RESPONSES), dtype=torch.float64, requires_grad=True)
        # At the weights that drew the samples, the host's own loss has the gradient of J-BOND's: all ratios are 1.
        name = getattr(method, "policy_loss", "ppo")
        self.policy_loss = registry.policy_loss("jbond" if name == "ppo" else name, method)
        self.step = 0
        self.cache: Tensor | None = None
        if self.needs.reward_cache:
            self.draw_cache()

    def draw_cache(self) -> None:
        """Draw the cached rewards anew, ``[P, M]``."""
        self.cache = self.problem.rewards[self._draw(self.problem.log_ref, self.training.cached)]

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """The loss of one fresh batch, and that of the classifier, each ``[]`` with gradient.

        Raises ContractError if the method returns something of another shape than its interface says, or not finite.
        """
        tokens = self.policy.token_log_probs()
        behaviour = self._log_probs("stored") if self.needs.offline else self.policy.log_probs()
        drawn = self._draw(behaviour.detach(), self.training.samples)
        made = self._transformed if isinstance(self.method, RewardTransform) else self._assembled
        with torch.no_grad():
            rows, under, advantages, targets = made(drawn, tokens.detach())
        flat = rows.flatten()
        inputs = LossInputs(
            log_probs=tokens[flat],
            old_log_probs=tokens.detach()[flat],
            advantages=advantages.flatten(0, 1) * MASK[flat],
            mask=MASK[flat],
            from_source=self.rows.from_source(self.training.prompts).flatten(),
            on_policy=True,
            clip_low=0.2,
            clip_high=0.2,
            under={name: values.flatten(0, 1) for name, values in under.items()},
            token_losses=self._token_losses(flat) if self.needs.logits else None,
        )
        found = assemble.weighed_loss(self.policy_loss, inputs, self.rows)
        classified = None
        if targets is not None:
            classified = binary_cross_entropy_with_logits(self.classifier[drawn], targets)
        self.step += 1
        return found.row_loss.sum() / self.training.prompts, classified

    def move_anchor(self, step: int) -> bool:
        """After optimiser step ``step`` (from 1); returns whether a periodic anchor has been renewed."""
        parameters = self.policy.parameters.detach()
        if self.needs.anchor_eta is not None:
            self.anchor += self.needs.anchor_eta * (parameters - self.anchor)
        renewed = self.needs.anchor_interval is not None and step % self.needs.anchor_interval == 0
        if renewed:
            self.anchor.copy_(parameters)
        return renewed

    def _log_probs(self, name: str) -> Tensor:
        """``[S]`` under other weights; stored responses are the reference's."""
        if name == "teacher":
            return self.problem.best_of(TEACHER)
        return self.policy.log_probs(self.anchor if name == "anchor" else torch.zeros_like(self.anchor))

    def _token_losses(self, rows: Tensor) -> Tensor:
        """``[B, A]``, of the method's loss on logits; the hidden states are the logits themselves."""
        layer, mask = torch.eye(VOCABULARY, dtype=torch.float64), MASK[rows].bool()
        heads = (
            Head(next_token_log_probs(log_probs)[rows][mask], layer)
            for log_probs in (self.policy.log_probs(), self.problem.best_of(TEACHER))
        )
        losses = self.method.token_losses(Logits(*heads))
        losses = assemble.checked("token_losses", losses, (int(mask.sum()),), finite=False)
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, losses)

    def _draw(self, log_probs: Tensor, count: int) -> Tensor:
        size = self.training.prompts * count
        drawn = torch.multinomial(log_probs.exp(), max(size, 1), replacement=True, generator=self.generator)
        return drawn[:size].reshape(self.training.prompts, count)

    def _transformed(self, drawn: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, None]:
        """REINFORCE on the transformed reward less its KL penalty, with the mean of the others as baseline."""
        rewards = self.problem.rewards[drawn]
        under = {"policy": tokens[drawn], "reference": token_log_probs(self._log_probs("reference"))[drawn]}
        batch = AdvantageInputs(rewards, rewards[:, :0], under, self.generator, self.cache)
        rewards = assemble.checked("rewards", self.method.transform(batch).rewards, drawn.shape)
        returns = rewards - (self.method.kl_coefficient or 0.0) * batch.log_ratio("reference")
        advantages = assemble.per_token("advantages", centre(returns, "batch"), drawn.shape, LENGTH)
        return drawn, under, advantages, None

    def _assembled(self, drawn: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        needs, rewards = self.needs, self.problem.rewards
        source = self._draw(self._log_probs(needs.source), needs.source_samples)
        places = assemble.select(self.method, drawn.shape[-1], rewards[source], self.generator)
        rows = torch.cat([drawn, source], dim=-1).gather(-1, places)
        under = {name: token_log_probs(self._log_probs(name))[rows] for name in needs.log_probs}
        if needs.offline or needs.source == "stored":  # what each of the rows was drawn from
            own = torch.arange(rows.shape[-1]) < (0 if needs.offline else self.rows.policy)
            stored = token_log_probs(self._log_probs("stored"))[rows]
            under["behaviour"] = torch.where(own.unsqueeze(-1), tokens[rows], stored)
        inputs = AdvantageInputs(
            rewards[drawn],
            rewards[source],
            {"policy": tokens[rows], **under},
            self.generator,
            reference_rewards=self.cache,
            classifier_logits=self.classifier.detach()[drawn] if needs.classifier else None,
            step=self.step,
        )
        found = assemble.advantages(self.method, inputs)
        return rows, under, found.advantages, found.classifier_targets


def train(problem: Problem, method: Method, policy: EnumerablePolicy, n: Goal, training: Training) -> Run:
    """Train ``policy`` in place, measuring it exactly against Best-of-n of the reference every few steps.

    ``n`` may be another target, too; it need not be the method's own.

    Raises:
        ContractError: see :meth:`Learner.losses`.
        FloatingPointError: the learning rate is too high.
        RegistryError: the method's policy loss is not registered.
    """
    learner = Learner(problem, method, policy, training)
    parameters = [{"params": [policy.parameters]}, {"params": [learner.classifier]}]
    optimiser = torch.optim.Adam(parameters, lr=training.lr)
    period = learner.needs.anchor_interval or training.steps
    trajectory = [problem.measure(policy.log_probs().detach(), n)]
    rounds: list[Point] = []
    for step in range(1, training.steps + 1):
        part = ((step - 1) % period) / period
        for group in optimiser.param_groups:
            group["lr"] = training.lr * (1.0 if learner.needs.anchor_eta else (1 + math.cos(math.pi * part)) / 2)
        loss, classified = learner.losses()
        optimiser.zero_grad()
        (loss if classified is None else loss + classified).backward()
        optimiser.step()
        renewed = learner.move_anchor(step)
        if renewed or step % _EVERY == 0 or step == training.steps:
            point = problem.measure(policy.log_probs().detach(), n, step)
            if not math.isfinite(point.kl_ref):
                raise FloatingPointError(f"the policy is no longer finite after step {step}: lower the learning rate")
            trajectory.append(point)
            if renewed:
                rounds.append(point)
    return Run(trajectory, rounds)
