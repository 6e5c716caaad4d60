"""What an algorithm is: which samples it wants, its advantages, and the policy loss that goes with them.

Every method of this family chooses a *target* distribution, a *divergence* to it, and *where the samples come from*:
:class:`Needs` says the last, :meth:`Algorithm.advantages` turns rewards and log-probabilities into one number a
sample (target and divergence), and a policy loss, a pure function from :class:`LossInputs` to :class:`LossOutputs`,
makes a gradient of them. Nothing here knows the host.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs, TransformOutputs
from bond_plugin.algorithms.logits import Logits
from bond_plugin.bestofn.targets import TARGETS, Target, target_of
from bond_plugin.options import number

Source = Literal["anchor", "reference", "stored"]


class DataError(ValueError):
    """What an algorithm raises of rewards that it cannot take. The message says what to do, and is shown as it is."""


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a :class:`Config`: its default, and the help text of its ``--bond.*`` flag.

    ``metadata`` may hold ``choices`` (a tuple), ``option`` (the flag's name, where it is not the field's), ``type``
    (what makes the value of its text, where that is not the default's); and the bounds of a number, with which the
    help ends: ``ge`` or ``gt`` (at least, above) and ``le`` (at most; without it, finite).
    """
    bounds = _bounds(**metadata)
    return field(default=default, metadata={"help": f"{help}; {bounds}" if bounds else help, **metadata})


def _bounds(ge: float | None = None, gt: float | None = None, le: float = math.inf, **_: Any) -> str:
    if ge is None and gt is None:
        return ""
    if le < math.inf:
        return f"in ({gt:g}, {le:g}]" if ge is None else f"in [{ge:g}, {le:g}]"
    return f"above {gt:g}" if ge is None else f"at least {ge:g}"


class Settings:
    """What :class:`Config` and :class:`TransformConfig` share: dataclasses whose fields, of :func:`flag`, are flags.

    What bounds do not say is checked in ``__post_init__``, by raising ``ValueError``.
    """

    @classmethod
    def options(cls, prefix: str) -> dict[str, Field]:
        """The flag's dotted name to each field; ``prefix`` is ``bond``, or the name of a transform."""
        return {f.metadata.get("option", f"{prefix}.{f.name}"): f for f in fields(cls)}

    @classmethod
    def from_flags(cls, values: dict[str, Any], prefix: str) -> Self:
        """Pick this config's fields out of dotted names and values, which may hold others as well."""
        found = cls(**{f.name: values[name] for name, f in cls.options(prefix).items() if name in values})
        found.check(prefix)
        return found

    def check(self, prefix: str) -> None:
        """Raises ValueError for the first number out of its bounds."""
        for name, f in self.options(prefix).items():
            bounds, value, said = _bounds(**f.metadata), getattr(self, f.name), f.metadata
            low, high = said.get("ge", -math.inf), said.get("le", sys.float_info.max)
            if bounds and not (low <= value <= high and value > said.get("gt", -math.inf)):
                verb = "lie" if bounds.startswith("in") else "be"
                raise ValueError(f"--{name} must {verb} {bounds}, got {value}")


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

    def __post_init__(self) -> None:
        self.check("bond")


def reward_cache_flag(
    help: str = "a file of rewards of the initial policy's samples, made by `bond cache` or in a layout of the vBoN "
    "authors'; quantiles are then computed from it",
) -> Any:
    """The field ``reward_cache`` of those that can use a file of the reference's rewards."""
    return flag("", help, option="bond.reward_cache")


def n_flag(default: int, help: str) -> Any:
    """The field ``n`` of :class:`Targeted`."""
    more = "Of Best-of-Poisson the mean number of samples, 1 + mu, above 1 and not necessarily whole"
    return flag(default, f"{help}. {more}", type=number)


@dataclass(frozen=True)
class Targeted(Settings):
    """The settings of those that have a choice of target, see :mod:`bond_plugin.bestofn.targets`."""

    prefix = "bond"  # of the flags, for messages
    n: float = n_flag(2, "N: the target is Best-of-N of the anchor, >= 2; the paper's is 2")
    target: str = flag(
        "best_of_n",
        "what to distil: 'best_of_n'; 'best_of_poisson', the best of 1 + Poisson(mu) samples (arXiv 2506.19248); "
        "'exponential', the tilt by exp(F / temperature), F the reward's quantile: the highest win rate at its KL",
        choices=TARGETS,
    )
    temperature: float = flag(
        0.1,
        "of the exponential target, which has no n: the coefficient of the KL beside the quantile, above 0. At 0.44, "
        "0.20 and 0.11 it is about as far from where it starts as Best-of-2, 4 and 8",
    )

    @property
    def goal(self) -> Target:
        """The target. Raises ValueError where its numbers are out of range."""
        return target_of(self.target, self.n, self.temperature, self.prefix)


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs beside the policy's ``--rollout.n_samples_per_prompt``: *source samples*, and more.

    Without source samples it runs on the host's own rollouts, experience maker and loss, in every mode of the host.

    Attributes:
        source_samples: m, how many a prompt from ``source``; 0 for none.
        selected_samples: f, how many of those per prompt enter the loss (see :meth:`Algorithm.select`).
        source: whose samples they are. ``anchor`` follows the policy, ``reference`` is the initial policy, ``stored``
            are responses from the reward cache (``bond cache --cache.log_probs``), drawn from it anew for each step.
        offline: the policy's samples are such stored responses too: nothing is sampled.
        log_probs: under which weights beside the policy's those of the rows are wanted: ``anchor``, ``reference``,
            ``teacher`` (a model of its own, ``--ref.model_name_or_path``).
        logits: whether :meth:`Algorithm.token_losses` compares the policy's logits with the teacher's.
        anchor_eta: the anchor moves by ``eta`` of its distance to the policy each optimiser step.
        anchor_interval: or it becomes a copy of the policy every so many optimiser steps. At most one of both.
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


class Algorithm:
    """Base class of everything in the entry-point group ``openrlhf.advantage_estimators``.

    ``policy_loss`` names an entry of ``openrlhf.policy_losses``; ``"ppo"``, the default, is the host's own clipped
    loss, ``"own"`` the method :meth:`loss`.
    """

    Config: ClassVar[type[Config]] = Config
    policy_loss: str = "ppo"

    def __init__(self, config: Config) -> None:
        self.config = config

    def needs(self) -> Needs:
        """What it needs. Depends on the settings alone."""
        return Needs()

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """Which source samples enter the loss, here all: ``[P, m]`` rewards to ``[P, f]`` indices."""
        return torch.arange(source_rewards.shape[-1]).expand(source_rewards.shape)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Turn one rollout batch into advantages. Without gradient."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each row, for ``policy_loss = "own"``: made anew at each optimiser step, of any form.

        Here the sum of what :meth:`token_losses` gave.
        """
        if inputs.token_losses is None:
            raise NotImplementedError(f"{type(self).__name__} has no loss of its own")
        return LossOutputs(inputs.token_losses.sum(dim=-1))

    def token_losses(self, logits: Logits) -> Tensor:
        """``[K]``, of each response token of a micro-batch, with gradient, for :attr:`Needs.logits`.

        Called at each optimiser step, before :meth:`loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss on logits")


@dataclass(frozen=True)
class TransformConfig(Settings):
    """The settings of a reward transform; each field is the flag ``--<name of the transform>.<field>``."""


class RewardTransform:
    """Base class of everything in the entry-point group ``openrlhf.reward_transforms``.

    A transform replaces the reward; advantages, policy loss, critic and KL penalty are the host's own.
    """

    Config: ClassVar[type[TransformConfig]] = TransformConfig

    def __init__(self, config: TransformConfig) -> None:
        self.config = config

    @property
    def kl_coefficient(self) -> float | None:
        """The coefficient of KL(pi || pi_ref) that goes with these rewards, > 0; ``None``: the user's."""
        return None

    def needs(self) -> Needs:
        """What it needs: log-probabilities under ``reference`` and a reward cache, or neither."""
        return Needs()

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        """Turn rewards into others. There are no source samples."""
        raise NotImplementedError
