"""What the laboratory trains: algorithms and reward transforms of any installed package, and some variants."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bond_plugin import registry
from bond_plugin.algorithms.base import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    RewardTransform,
    TransformOutputs,
)
from bond_plugin.algorithms.bond import BOND
from bond_plugin.algorithms.vbon import VBoN
from bond_plugin.bestofn.baselines import centre
from bond_plugin.words import did_you_mean

#: What ``--bond.reward_cache`` is here: rewards of the reference that the laboratory draws before training.
CACHE = "lab"

Method = Algorithm | RewardTransform


def method_class(name: str) -> type[Method]:
    """The algorithm or reward transform that an installed package registers as ``name``, or that it is the path of.

    Raises RegistryError if nobody does, it cannot be imported, or it is not of the class it should be.
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


class VBoNByN(VBoN):
    """The exact reward divided by N, as in the authors' code, with the coefficient 1 / (N - 1) all the same."""

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=found.rewards * (self.config.n - 1) / self.config.n)


class HarmonicVBoN(VBoN):
    """log F by the harmonic estimate, :func:`harmonic_log_quantile`."""

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=harmonic_log_quantile(batch.rewards, batch.reference_rewards))


class HarmonicBOND(BOND):
    """BOND with a reward cache and log F by the harmonic estimate, for beta = 1."""

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        log_quantile = harmonic_log_quantile(batch.rewards, batch.reference_rewards)
        log_ratio = batch.log_ratio("reference")
        return AdvantageOutputs(centre((self.config.n - 1) * log_quantile - log_ratio, "batch"))


def harmonic_log_quantile(rewards: Tensor, samples: Tensor) -> Tensor:
    """An estimate of log F of each reward by its rank among k samples of the reference: H_c - H_k, c samples below.

    Here H_j = 1 + 1/2 + ... + 1/j. With e equals it is the mean over their random orders, that is over c, c + 1, ...,
    c + e below. Its expectation is -sum_{j=1..k} E[(1 - F)^j] / j, the Taylor series of log F, with F uniform in
    [p_<, p_<=].

    Args:
        rewards: ``[P, n]``.
        samples: ``[P, k]``, k >= 1.

    Returns:
        ``[P, n]`` float64, in [-H_k, 0], in nats.
    """
    count = torch.arange(1, samples.shape[-1] + 1, dtype=torch.float64)
    harmonic = torch.cat([count.new_zeros(1), count.reciprocal().cumsum(dim=0)])
    ordered = samples.sort(dim=-1).values
    lower = torch.searchsorted(ordered, rewards)
    not_higher = torch.searchsorted(ordered, rewards, right=True)
    equal, high = not_higher - lower, harmonic[not_higher]
    # By sum_{c=0..m} H_c = (m + 1) H_m - m.
    return high - harmonic[-1] + (lower * (high - harmonic[lower]) - equal) / (equal + 1)
