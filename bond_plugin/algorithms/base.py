"""What an algorithm is: which samples it wants, its advantages, and the policy loss that goes with them.

Every method of this family chooses a *target* distribution, a *divergence* to it, and *where the samples
come from*. The interface has a place for each: :class:`Needs` says where the samples come from,
:meth:`Algorithm.advantages` turns rewards and log-probabilities into one number a sample (target and
divergence), and a policy loss, a pure function from :class:`LossInputs` to :class:`LossOutputs`, makes a
gradient of them. Nothing here knows the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from bond_plugin.algorithms.logits import Logits
from bond_plugin.bestofn.targets import TARGETS

Source = Literal["anchor", "reference", "stored"]


class DataError(ValueError):
    """What an algorithm raises of rewards that it cannot take. The message says what to do, and is shown as it is."""


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a :class:`Config`: its default, and the help text of its ``--bond.*`` flag.

    ``metadata`` may hold ``choices`` (a tuple), ``option`` (the flag's name, where it is not the field's) and
    ``type`` (what makes the value of its text, where that is not the type of the default).
    """
    return field(default=default, metadata={"help": help, **metadata})


class Settings:
    """What :class:`Config` and :class:`TransformConfig` share: dataclasses whose fields are flags.

    Subclasses add fields with :func:`flag` and check them in ``__post_init__`` by raising ``ValueError``.
    """

    @classmethod
    def options(cls, prefix: str) -> dict[str, Field]:
        """The flag's dotted name to each field; ``prefix`` is ``bond``, or the name of a transform."""
        return {f.metadata.get("option", f"{prefix}.{f.name}"): f for f in fields(cls)}

    @classmethod
    def from_flags(cls, values: dict[str, Any], prefix: str) -> Self:
        """Pick this config's fields out of dotted names and values, which may hold others as well."""
        return cls(**{f.name: values[name] for name, f in cls.options(prefix).items() if name in values})


@dataclass(frozen=True)
class Config(Settings):
    """The hyper-parameters of an algorithm; each field is the flag ``--bond.<field>``."""

    kl_ref: bool = flag(
        True,
        "report bond/kl_ref, the KL to the initial policy, each step, from one response of four (from all where "
        "the algorithm needs those log-probabilities anyway, or draws source samples). Costs their forward passes "
        "and two bytes a parameter, shared over the data-parallel ranks; it does not change the training",
    )
    max_engine_gap: float = flag(
        0.3,
        "stop when the trainer and the vLLM engine disagree on the log-probabilities of the same tokens by "
        "more than this on average (nats a token): the sign of weights that did not reach the engine",
    )


def reward_cache_flag(
    help: str = "a file of rewards of the initial policy's samples, made by `bond cache` or in a layout of the vBoN "
    "authors'; quantiles are then computed from it",
) -> Any:
    """The field ``reward_cache`` of those that can use a file of the reference's rewards."""
    return flag("", help, option="bond.reward_cache")


def target_flag() -> Any:
    """The field ``target`` of those that have a choice of it, see :mod:`bond_plugin.bestofn.targets`."""
    return flag(
        "best_of_n",
        "what to distil: 'best_of_n'; 'best_of_poisson', the best of 1 + Poisson(mu) samples (arXiv 2506.19248); "
        "'exponential', the tilt by exp(F / temperature), F the reward's quantile: the highest win rate at its KL",
        choices=TARGETS,
    )


def temperature_flag() -> Any:
    """The field ``temperature`` that goes with it."""
    return flag(
        0.1,
        "of the exponential target, which has no n: the coefficient of the KL beside the quantile, above 0. At 0.44, "
        "0.20 and 0.11 it is about as far from where it starts as Best-of-2, 4 and 8",
    )


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs beside the policy's ``--rollout.n_samples_per_prompt``: *source samples*, and more.

    An algorithm without source samples runs on the host's own rollouts, experience maker and loss, in every mode
    that the host has.

    Attributes:
        source_samples: m, how many a prompt from ``source``; 0 for none.
        selected_samples: f, how many of those per prompt enter the loss (see :meth:`Algorithm.select`).
        source: whose samples they are. ``anchor`` follows the policy, ``reference`` is the initial policy,
            ``stored`` are responses from the reward cache (``bond cache --cache.log_probs``), drawn from it anew for
            each step.
        offline: the policy's samples are such stored responses too: nothing is sampled.
        log_probs: under which weights beside the policy's the log-probabilities of the rows are wanted: ``anchor``,
            ``reference``, ``teacher`` (a model of its own, ``--ref.model_name_or_path``).
        anchor_eta: the anchor is a moving average: it moves by ``eta`` of its distance to the policy each
            optimiser step.
        anchor_interval: the anchor becomes a copy of the policy every so many optimiser steps. ``None`` for
            both if no anchor is needed; at most one of them is given.
        logits: whether :meth:`Algorithm.token_losses` compares the policy's logits with the teacher's.
        reward_cache: whether :attr:`AdvantageInputs.reference_rewards` come from ``--bond.reward_cache``.
        classifier: whether a sequence classifier is trained in the host's critic slot.
        least: how many samples of the policy a prompt it takes at the least.
    """

    source_samples: int = 0
    selected_samples: int = 0
    source: Source = "anchor"
    offline: bool = False
    log_probs: Collection[str] = frozenset()
    logits: bool = False
    anchor_eta: float | None = None
    anchor_interval: int | None = None
    reward_cache: bool = False
    classifier: bool = False
    least: int = 1

    def __post_init__(self) -> None:
        if self.anchor_eta is not None and self.anchor_interval is not None:
            raise ValueError("an anchor is a moving average or a periodic copy, not both")
        if "anchor" in self.weights and not self.anchor:
            raise ValueError("samples of an anchor need anchor_eta or anchor_interval; or use source='reference'")
        if (self.offline or (self.source == "stored" and self.source_samples)) and not self.reward_cache:
            raise ValueError("stored responses come with their rewards: reward_cache=True")
        if self.logits and "teacher" not in self.log_probs:
            raise ValueError("the logits are compared with a teacher's: log_probs={'teacher'}")
        unknown = self.weights - {"anchor", "reference", "teacher"}
        if unknown:
            raise ValueError(f"log_probs knows anchor, reference and teacher, not {', '.join(sorted(unknown))}")

    @property
    def anchor(self) -> bool:
        """Whether an anchor is kept."""
        return self.anchor_eta is not None or self.anchor_interval is not None

    @property
    def weights(self) -> set[str]:
        """The weights beside the policy's from which samples are drawn or whose log-probabilities are wanted."""
        drawn = self.source_samples and self.source != "stored"
        return {*self.log_probs, *([self.source] if drawn else [])}


@dataclass(frozen=True)
class AdvantageInputs:
    """One rollout batch: P prompts with n samples of the policy and m source samples each, of which f are selected.

    A prompt's *rows* are its n samples of the policy and then the f selected ones of the source.

    Attributes:
        rewards: ``[P, n]`` float64, of the policy's samples.
        source_rewards: ``[P, m]`` float64, of all source samples.
        under: log-probabilities of each token of the rows, ``[P, n + f, A]`` float64, response tokens from the left,
            0 beyond a response's end, by the weights: ``policy``, those of :attr:`Needs.log_probs`, and
            ``behaviour``, what each row was drawn from, where that is not the policy as it is: in asynchronous
            training, and with stored responses.
        generator: seeded by the run's seed and the step; the only source of randomness to use.
        reference_rewards: ``[P, M]`` float64 from the reward cache, or ``None``.
        classifier_logits: ``[P, n]`` float64, what the sequence classifier says of the policy's samples, or
            ``None``.
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
        classifier_targets: ``[P, n]`` in [0, 1], what the sequence classifier is trained to say of the
            policy's samples (binary cross-entropy); ``None`` without a classifier.
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
        on_policy: whether the weights are still those that produced the samples, for certain: one epoch,
            one optimiser step a rollout.
        clip_low, clip_high: the host's ``--actor.eps_clip_low_high``.
        under: log-probabilities of each response token under other weights, ``[B, A]`` each, without gradient:
            of those that :attr:`Needs.log_probs` names, for an algorithm with a loss of its own; where stored
            responses are trained on, ``behaviour`` too, what each row was drawn from.
        token_losses: ``[B, A]``, what :meth:`Algorithm.token_losses` gave, 0 beyond a response's end; ``None``
            without :attr:`Needs.logits`.
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


@dataclass(frozen=True)
class LossOutputs:
    """The loss of each row, before any mean.

    What is minimised is the mean over prompts of (the mean over a prompt's rows of the policy + the mean over its
    rows of the source), whatever the sharding, the micro-batch size and the accumulation.

    Attributes:
        row_loss: ``[B]``.
        clip_fraction: ``[]`` share of tokens at which clipping took the gradient away.
    """

    row_loss: Tensor
    clip_fraction: Tensor


class Algorithm:
    """Base class of everything in the entry-point group ``openrlhf.advantage_estimators``.

    ``policy_loss`` names an entry of ``openrlhf.policy_losses``; the default, ``"ppo"``, is the host's own
    clipped loss, so that an algorithm which only has an idea about advantages needs nothing else. ``"own"`` is its
    method :meth:`loss`.
    """

    Config: ClassVar[type[Config]] = Config
    policy_loss: str = "ppo"

    def __init__(self, config: Config) -> None:
        self.config = config

    def needs(self) -> Needs:
        """What it needs. Depends on the settings alone."""
        return Needs()

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """Which source samples enter the loss: ``[P, m]`` rewards to ``[P, f]`` indices, f = selected_samples."""
        raise NotImplementedError(f"{type(self).__name__} trains on source samples but does not select any")

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Turn one rollout batch into advantages. Without gradient."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each row, for ``policy_loss = "own"``: made anew at each optimiser step, of any form."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    def token_losses(self, logits: Logits) -> Tensor:
        """``[K]``, of each response token of a micro-batch, for :attr:`LossInputs.token_losses`.

        For :attr:`Needs.logits`. With gradient; called at each optimiser step, before :meth:`loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss on logits")


@dataclass(frozen=True)
class TransformConfig(Settings):
    """The settings of a reward transform; each field is the flag ``--<name of the transform>.<field>``."""


@dataclass(frozen=True)
class TransformOutputs:
    """What the host is to take for the rewards.

    Attributes:
        rewards: ``[P, n]``.
        metrics: scalars by name.
    """

    rewards: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class RewardTransform:
    """Base class of everything in the entry-point group ``openrlhf.reward_transforms``.

    A transform replaces the reward; advantages, policy loss, critic and KL penalty are the host's own, with
    whichever of its estimators ``--algo.advantage.estimator`` names.
    """

    Config: ClassVar[type[TransformConfig]] = TransformConfig

    def __init__(self, config: TransformConfig) -> None:
        self.config = config

    @property
    def kl_coefficient(self) -> float | None:
        """The coefficient of KL(pi || pi_ref) that belongs to these rewards, > 0: ``--algo.kl.init_coef``.

        ``None`` leaves it to the user.
        """
        return None

    def needs(self) -> Needs:
        """What it needs: log-probabilities under ``reference`` and a reward cache, or neither."""
        return Needs()

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        """Turn rewards into others. There are no source samples."""
        raise NotImplementedError
