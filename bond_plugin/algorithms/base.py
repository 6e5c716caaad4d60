"""What an algorithm is: which samples it wants, its advantages, and the policy loss that goes with them.

Every method of this family chooses a *target* distribution, a *divergence* to it, and *where the samples
come from*. The interface has a place for each: :class:`Samples` says where the samples come from,
:meth:`Algorithm.advantages` turns rewards and log-probabilities into one number a sample (target and
divergence), and a policy loss, a pure function from :class:`LossInputs` to :class:`LossOutputs`, makes a
gradient of them. Nothing here knows the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

CompanionSource = Literal["anchor", "reference"]


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a :class:`Config`: its default, and the help text of its ``--bond.*`` flag.

    ``metadata`` may hold ``choices`` (a tuple). The flag's type is that of the default.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of an algorithm; each field is the flag ``--bond.<field>``.

    Subclasses add fields with :func:`flag` and check them in ``__post_init__`` by raising ``ValueError``.
    """

    kl_ref: bool = flag(
        True,
        "report bond/kl_ref, the KL to the initial policy, each step. Costs one more forward pass and two "
        "bytes a parameter, shared over the data-parallel ranks; it does not change the training",
    )
    max_engine_gap: float = flag(
        0.3,
        "stop when the trainer and the vLLM engine disagree on the log-probabilities of the same tokens by "
        "more than this on average (nats a token): the sign of weights that did not reach the engine",
    )

    @classmethod
    def from_args(cls, args: Any) -> Config:
        """Pick this config's fields out of a namespace that may hold others as well."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})


@dataclass(frozen=True)
class Samples:
    """Which samples an algorithm wants beside the policy's ``--rollout.n_samples_per_prompt``.

    Attributes:
        companions: how many a prompt from ``source``; 0 for none.
        trained_companions: how many of those per prompt enter the loss (see :meth:`Algorithm.select`).
        source: whose samples they are. ``anchor`` is the moving average of the policy, ``reference`` the
            initial policy.
        anchor_eta: the anchor moves by ``eta`` of its distance to the policy each optimiser step; ``None``
            if no anchor is needed.
    """

    companions: int = 0
    trained_companions: int = 0
    source: CompanionSource = "anchor"
    anchor_eta: float | None = None


@dataclass(frozen=True)
class AdvantageInputs:
    """One rollout batch: P prompts, n samples of the policy each, m companions each.

    Attributes:
        rewards: ``[P, n]`` float64, of the policy's samples.
        log_probs: ``[P, n]`` float64, log pi(y), summed over the tokens of the response.
        companion_rewards: ``[P, m]`` float64.
        companion_log_probs: ``[P, f]`` float64, log pi of the companions that were selected for training.
        anchor_log_probs: ``[P, n]`` float64, log pi_anchor of the policy's samples, or ``None``.
        generator: seeded by the run's seed and the step; the only source of randomness to use.
    """

    rewards: Tensor
    log_probs: Tensor
    companion_rewards: Tensor
    companion_log_probs: Tensor
    anchor_log_probs: Tensor | None
    generator: torch.Generator


@dataclass(frozen=True)
class AdvantageOutputs:
    """One number a sample, and what to log.

    Attributes:
        advantages: ``[P, n]``, for the policy's samples.
        companion_advantages: ``[P, f]``, for the selected companions; ``None`` without companions.
        metrics: scalars by name.
    """

    advantages: Tensor
    companion_advantages: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch of B responses, right-padded to A tokens.

    Attributes:
        log_probs: ``[B, A]`` log pi of each response token under the weights being trained.
        old_log_probs: ``[B, A]`` the same at the start of the rollout step, without gradient.
        advantages: ``[B, A]``, for sequence-level algorithms the same number in every token of a row.
        mask: ``[B, A]`` 1 on response tokens.
        companion: ``[B]`` bool: the row is a companion, not a sample of the policy.
        on_policy: whether the weights are still those that produced the samples, for certain: one epoch,
            one optimiser step a rollout.
        clip_low, clip_high: the host's ``--actor.eps_clip_low_high``.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    companion: Tensor
    on_policy: bool
    clip_low: float
    clip_high: float


@dataclass(frozen=True)
class LossOutputs:
    """The loss of each row, before any mean.

    The host takes the mean over prompts of (the mean over a prompt's policy rows + the mean over its
    companion rows), whatever the sharding, the micro-batch size and the accumulation.

    Attributes:
        row_loss: ``[B]``.
        clip_fraction: ``[]`` share of tokens at which clipping took the gradient away.
    """

    row_loss: Tensor
    clip_fraction: Tensor


class Algorithm:
    """Base class of everything in the entry-point group ``openrlhf.advantage_estimators``.

    ``policy_loss`` names an entry of ``openrlhf.policy_losses``; the default, ``"ppo"``, is the host's own
    clipped loss, so that an algorithm which only has an idea about advantages needs nothing else.
    """

    Config: ClassVar[type[Config]] = Config
    policy_loss: ClassVar[str] = "ppo"

    def __init__(self, config: Config) -> None:
        self.config = config

    def samples(self) -> Samples:
        """Which samples it wants. Called once, before anything starts."""
        return Samples()

    def select(self, companion_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """Which companions enter the loss: ``[P, m]`` rewards to ``[P, f]`` indices, f = trained_companions."""
        raise NotImplementedError(f"{type(self).__name__} trains on companions but does not select any")

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Turn one rollout batch into advantages. Without gradient."""
        raise NotImplementedError
