"""What a run's arguments ask for: the algorithm or transform they select, and what is kept and computed for it.

The host hands its nested arguments to every process of a run. :func:`of` makes of them, wherever it is called, the
same frozen :class:`Run`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from bond_plugin.algorithms.assemble import Rows
from bond_plugin.algorithms.base import Algorithm, Needs, RewardTransform
from bond_plugin.host import flags


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        algorithm: ours, or ``None`` for the host's own estimators.
        transform: of the rewards, or ``None``.
        needs: the algorithm's or the transform's; of the host's own estimators a moving reference's
            (``--ref.update``), which is an anchor whose log-probabilities stand in the reference model's place.
        rows: of a prompt.
        reports_kl: whether the KL to the initial policy is reported.
    """

    algorithm: Algorithm | None
    transform: RewardTransform | None
    needs: Needs
    rows: Rows
    reports_kl: bool

    @property
    def moving_reference(self) -> bool:
        """Whether an anchor takes the place of the reference model of the host's own estimators."""
        return self.algorithm is None and self.needs.anchor

    @property
    def taught(self) -> bool:
        """Whether the host's reference model is a teacher."""
        return "teacher" in self.needs.log_probs

    @property
    def stored(self) -> int:
        """How many stored responses a prompt a step takes; 0 where none are trained on."""
        beside = self.needs.source_samples if self.needs.source == "stored" else 0
        return max(beside, self.rows.policy if self.needs.offline else 0)

    @property
    def keeps_reference(self) -> bool:
        """Whether the training workers keep the initial policy's weights."""
        sampled = self.needs.source_samples > 0 and self.needs.source == "reference"
        return sampled or "reference" in self.log_probs

    @property
    def log_probs(self) -> tuple[str, ...]:
        """Under which other weights, ``anchor`` or ``reference``, the policy's workers compute log-probabilities.

        A transform has the host's reference model, as it has the host's estimators.
        """
        if self.transform is not None:
            return ()
        wanted = {*self.needs.log_probs, *(["reference"] if self.reports_kl else [])}
        return tuple(sorted(wanted - {"teacher"}))

    @property
    def in_slot(self) -> str | None:
        """Which stand where the host has its reference model's: the teacher's; else the source's, if wanted."""
        if self.taught:
            return "teacher"
        if self.needs.source in self.log_probs:
            return self.needs.source
        return self.log_probs[0] if self.log_probs else None

    @property
    def kl_from_few(self) -> bool:
        """Whether nothing but the report wants the initial policy's log-probabilities, so that a part serves."""
        without = "reference" not in self.needs.log_probs and self.in_slot != "reference"
        return self.reports_kl and without and self.needs.source_samples == 0


def of(args: SimpleNamespace) -> Run:
    """The run of the host's nested arguments; of one of its other trainers, nothing of ours."""
    advantage = getattr(getattr(args, "algo", None), "advantage", None)
    if advantage is None:
        return Run(None, None, Needs(), Rows(1), reports_kl=False)
    algorithm = _made(flags.algorithm_class, advantage.estimator, "bond", _settings(args, "bond"))
    name = getattr(getattr(args, "reward", None), "transform", None)
    settings = _settings(args, "bond") + _settings(args, name or "")
    transform = None if name is None else _made(flags.transform_class, name, name, settings)
    ours = algorithm or transform
    needs = _of_reference(args) if ours is None else ours.needs()
    rows = Rows(args.rollout.n_samples_per_prompt, needs.selected_samples)
    return Run(algorithm, transform, needs, rows, reports_kl=algorithm is not None and algorithm.config.kl_ref)


def in_bytes(args: SimpleNamespace, name: str) -> int:
    """The flag ``--bond.<name>``, which is in MiB; 0 in one of the host's other trainers, which do not know it."""
    return int(getattr(getattr(args, "bond", None), name, 0) * 2**20)


def _of_reference(args: SimpleNamespace) -> Needs:
    ref = getattr(args, "ref", None)
    match getattr(ref, "update", "none"):
        case "ema":
            return Needs(log_probs={"anchor"}, anchor_eta=ref.eta)
        case "periodic":
            return Needs(log_probs={"anchor"}, anchor_interval=ref.interval)
    return Needs()


@functools.lru_cache(maxsize=16)
def _made(find: Callable[[str], Any], name: str, prefix: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    """The algorithm or the transform of a name, with its settings; ``None`` if it is one of the host's own."""
    found = find(name)
    return None if found is None else found(found.Config.from_flags(dict(settings), prefix))


def _settings(args: SimpleNamespace, group: str) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((f"{group}.{k}", v) for k, v in vars(getattr(args, group, SimpleNamespace())).items()))
