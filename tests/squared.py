"""An algorithm whose loss is not linear in log pi: log pi / pi_ref is fitted to the reward, on the policy's samples.

    minimise  1/2 (r(y) - mean of the prompt's other rewards - log pi(y) / pi_ref(y))^2

At pi = pi_ref exp(r) / Z what is left of the bracket does not depend on y, so the gradient is zero there. Beside it
two that train on stored responses. No package of ours registers them: the tests take them by their import path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.algorithms import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    Config,
    LossInputs,
    LossOutputs,
    Needs,
)
from bond_plugin.algorithms.base import reward_cache_flag


class Squared(Algorithm):
    policy_loss = "own"
    compared = "reference"

    def needs(self) -> Needs:
        return Needs(least=2, log_probs={"reference", self.compared})

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """The target of log pi / pi_ref, which the loss finds in the advantages' place."""
        others = (batch.rewards.sum(dim=-1, keepdim=True) - batch.rewards) / (batch.n - 1)
        target = batch.rewards - others
        log_ratio = batch.log_ratio(self.compared)
        rest = (target - log_ratio).square().mean().item() / 2
        return AdvantageOutputs(target, metrics={"squared/before": rest, "squared/kl": log_ratio.mean().item()})

    def loss(self, inputs: LossInputs) -> LossOutputs:
        mask = inputs.mask.to(inputs.log_probs.dtype)

        def total(values: Tensor) -> Tensor:
            return torch.where(inputs.mask.bool(), values, 0.0).sum(dim=-1)

        target = total(inputs.advantages) / mask.sum(dim=-1)
        rest = target - total(inputs.log_probs - inputs.under[self.compared])
        return LossOutputs(row_loss=rest.square() / 2, clip_fraction=torch.zeros(()))


class Taught(Squared):
    """The same with a teacher in the reference's place."""

    compared = "teacher"


@dataclass(frozen=True)
class Cached(Config):
    reward_cache: str = reward_cache_flag()


def gap(batch: AdvantageInputs, rows: slice) -> float:
    """How far the stored log-probabilities of some rows are from the initial policy's, from which they were drawn."""
    return (batch.under["behaviour"] - batch.under["reference"])[:, rows].abs().mean().item()


class Offline(Squared):
    """The same on stored responses alone. They are not the policy's, so the bracket must be zero for each, and Z is
    estimated from all of a prompt's rewards.
    """

    Config = Cached

    def needs(self) -> Needs:
        return Needs(log_probs={"reference"}, reward_cache=True, offline=True)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        known = batch.reference_rewards
        log_z = known.logsumexp(dim=-1, keepdim=True) - math.log(known.shape[-1])
        target = batch.rewards - log_z
        rest = (target - batch.log_ratio("reference")).square().mean().item() / 2
        return AdvantageOutputs(target, metrics={"squared/before": rest, "squared/gap": gap(batch, slice(None))})


class Beside(Algorithm):
    """Imitates the best of three stored responses, beside samples of the policy that teach nothing."""

    Config = Cached
    policy_loss = "jbond"

    def needs(self) -> Needs:
        return Needs(
            source_samples=3, selected_samples=1, source="stored", log_probs={"reference"}, reward_cache=True
        )

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        return source_rewards.argmax(dim=-1, keepdim=True)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        of_policy = batch.log_ratio("behaviour").abs().max().item()
        best = torch.ones(len(batch.rewards), 1, dtype=torch.float64)
        nll = -batch.log_probs[:, batch.n :].mean().item()
        metrics = {"beside/gap": gap(batch, slice(batch.n, None)), "beside/policy": of_policy, "beside/nll": nll}
        return AdvantageOutputs(torch.zeros_like(batch.rewards), best, metrics)
