"""What the laboratory trains: algorithms and reward transforms of any installed package, and some variants."""

from __future__ import annotations

from dataclasses import replace

from bond_plugin import registry
from bond_plugin.algorithms.base import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    Needs,
    RewardTransform,
    TransformInputs,
    TransformOutputs,
)
from bond_plugin.algorithms.bond import BOND
from bond_plugin.algorithms.vbon import VBoN
from bond_plugin.bestofn.divergences import backward_kl
from bond_plugin.bestofn.pooled import harmonic_log_quantile_among
from bond_plugin.words import did_you_mean

#: What ``--bond.reward_cache`` is here: rewards of the reference that the laboratory draws before training.
CACHE = "lab"

Method = Algorithm | RewardTransform


def method_class(name: str) -> type[Method]:
    """The algorithm or reward transform that an installed package registers as ``name``, or that it is the path of.

    Raises:
        RegistryError: nobody does, it cannot be imported, or it is not of the class it should be.
    """
    if ":" in name:  # package.module:Class
        return registry.load_class(registry.ADVANTAGE_ESTIMATORS, name, Algorithm)
    kinds = ((registry.ADVANTAGE_ESTIMATORS, Algorithm), (registry.REWARD_TRANSFORMS, RewardTransform))
    for group, base in kinds:
        if name in registry.names(group):
            return registry.load_class(group, name, base)
    known = [name for group, _ in kinds for name in registry.names(group)]
    hint = did_you_mean(name, known) or f" (known: {', '.join(known) or 'none'})"
    raise registry.RegistryError(f"--algorithm {name}: no installed package registers it{hint}")


def build(name: str, **settings: object) -> Method:
    """The method ``name`` with the fields of its ``Config``; a reward transform gets its cache from the lab."""
    found = method_class(name)
    if issubclass(found, RewardTransform) and "reward_cache" in found.Config.__dataclass_fields__:
        settings.setdefault("reward_cache", CACHE)
    return found(found.Config(**settings))


def needs_of(method: Method) -> Needs:
    """What a method needs; a reward transform, cached rewards alone."""
    return method.needs() if isinstance(method, Algorithm) else Needs(reward_cache=True)


class VBoNByN(VBoN):
    """The exact reward divided by N, as in the authors' code, with the coefficient 1 / (N - 1) all the same."""

    def transform(self, batch: TransformInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=found.rewards * (self.config.n - 1) / self.config.n)


class HarmonicVBoN(VBoN):
    """log F by the harmonic estimate, :func:`~bond_plugin.bestofn.pooled.harmonic_log_quantile_among`."""

    def transform(self, batch: TransformInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=harmonic_log_quantile_among(batch.rewards, batch.reference_rewards))


class HarmonicBOND(BOND):
    """BOND with a reward cache and log F by the harmonic estimate, for beta = 1."""

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        log_quantile = harmonic_log_quantile_among(batch.rewards, batch.reference_rewards)
        log_ratio = batch.log_probs - batch.source_log_probs
        return AdvantageOutputs(-backward_kl(log_ratio, (self.config.n - 1) * log_quantile, "batch").weights)
