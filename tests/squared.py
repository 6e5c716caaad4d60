"""An algorithm whose loss is not linear in log pi: log pi / pi_ref is fitted to the reward, on the policy's samples.

    minimise  1/2 (r(y) - mean of the prompt's other rewards - log pi(y) / pi_ref(y))^2

At pi = pi_ref exp(r) / Z what is left of the bracket does not depend on y, so the gradient is zero there. No package
of ours registers it: test_lab.py and test_modes_end_to_end.py take it by its import path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, LossInputs, LossOutputs, Needs


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
