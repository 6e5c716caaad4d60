"""What an algorithm is given of a rollout and of a micro-batch, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageInputs:
    """One rollout batch: P prompts with n samples of the policy and m source samples each, of which f are selected.

    A prompt's *rows* are its n samples of the policy and then the f selected ones of the source.

    Attributes:
        rewards: ``[P, n]`` float64, of the policy's samples.
        source_rewards: ``[P, m]`` float64, of all source samples.
        under: log-probabilities of each token of the rows, ``[P, n + f, A]`` float64, response tokens from the left,
            0 beyond a response's end, by the weights: ``policy``, those of ``Needs.log_probs``, and ``behaviour``,
            what each row was drawn from, where that is not the policy as it is (asynchronous training, stored
            responses).
        generator: seeded by the run's seed and the step; the only source of randomness to use.
        reference_rewards: ``[P, M]`` float64 from the reward cache, or ``None``.
        classifier_logits: ``[P, n]`` float64, the sequence classifier's of the policy's samples, or ``None``.
        step: rollouts that the run has trained on before, counted on after a resumption.
    """

    rewards: Tensor
    source_rewards: Tensor
    under: Mapping[str, Tensor]
    generator: torch.Generator
    reference_rewards: Tensor | None = None
    classifier_logits: Tensor | None = None
    step: int = 0

    @property
    def n(self) -> int:
        """Samples of the policy a prompt."""
        return self.rewards.shape[-1]

    @property
    def log_probs(self) -> Tensor:
        """``[P, n + f]``: log pi of each row."""
        return self.under["policy"].sum(dim=-1)

    def log_ratios(self, name: str) -> Tensor:
        """``[P, n + f, A]``: log pi - log of ``name``, of each token of the rows."""
        return self.under["policy"] - self.under[name]

    def log_ratio(self, name: str) -> Tensor:
        """``[P, n]``: log pi(y) - log of ``name``, of the policy's samples."""
        return self.log_ratios(name)[:, : self.n].sum(dim=-1)


@dataclass(frozen=True)
class AdvantageOutputs:
    """One number a sample, or one a token, and what to log.

    Attributes:
        advantages: ``[P, n]``, for the policy's samples, or ``[P, n, A]``, for each of their tokens.
        selected_advantages: ``[P, f]`` or ``[P, f, A]``, for the selected source samples; ``None`` without.
        metrics: scalars by name.
        classifier_targets: ``[P, n]`` in [0, 1], what the classifier is trained to say; ``None`` without one.
    """

    advantages: Tensor
    selected_advantages: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    classifier_targets: Tensor | None = None


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch of B responses, right-padded to A tokens.

    Attributes:
        log_probs: ``[B, A]`` log pi of each response token under the weights being trained.
        old_log_probs: ``[B, A]`` the same at the start of the rollout step, without gradient.
        advantages: ``[B, A]``; of an algorithm with one number a sample, the same in every token of a row.
        mask: ``[B, A]`` 1 on response tokens.
        from_source: ``[B]`` bool: the row is a source sample, not one of the policy.
        on_policy: whether the weights are still those that produced the samples: one optimiser step a rollout.
        clip_low, clip_high: the host's ``--actor.eps_clip_low_high``.
        under: log-probabilities of each response token under other weights, ``[B, A]`` each, without gradient:
            those of ``Needs.log_probs``, for an algorithm with a loss of its own; with stored responses
            ``behaviour``.
        token_losses: ``[B, A]``, what ``Algorithm.token_losses`` gave, 0 beyond a response's end; or ``None``.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    from_source: Tensor
    on_policy: bool
    clip_low: float
    clip_high: float
    under: Mapping[str, Tensor] = field(default_factory=dict)
    token_losses: Tensor | None = None

    def within(self, values: Tensor) -> Tensor:
        """``[B, A]`` of response tokens; 0 beyond, where padding can carry anything: so no product with the mask."""
        return torch.where(self.mask.bool(), values, 0.0)


@dataclass(frozen=True)
class LossOutputs:
    """The loss of each row, ``[B]``, and the share of tokens at which clipping took the gradient away, ``[]``.

    What is minimised is the mean over prompts of (the mean over a prompt's rows of the policy + the mean over its
    rows of the source), whatever the sharding, the micro-batch size and the accumulation.
    """

    row_loss: Tensor
    clip_fraction: Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass(frozen=True)
class TransformOutputs:
    """What the host is to take for the rewards, ``[P, n]``, and scalars to log by name."""

    rewards: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
