"""A*-PO: "Accelerating RL for LLM Reasoning with Optimal Advantage Regression", arXiv 2505.20686.

The optimum of RL with a KL penalty is pi*(y) = pi_ref(y) exp((r(y) - V*) / beta), and its value is

    V* = beta log E_ref exp(r / beta)

Stage 1 is `bond cache`: V* of a prompt from its M reference rewards, at beta1. Stage 2 fits the policy by least
squares (:mod:`bond_plugin.algorithms.regression`), at beta2:

    (beta2 (log pi(y) - log pi_ref(y)) - (r(y) - V*))^2

On samples of the policy, as in the paper, V* is a baseline: the target is pi_ref exp(r / beta2) / Z for every beta1,
which decides about noise alone. Where beta1 is large V* is near the mean reward, the better baseline at the start;
where it is beta2 the bracket is zero at the target. Offline pi* must be normalised, so there beta1 must be beta2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bond_plugin.algorithms.base import flag
from bond_plugin.algorithms.batch import AdvantageInputs
from bond_plugin.algorithms.regression import Regression, RegressionConfig


@dataclass(frozen=True)
class AStarPOConfig(RegressionConfig):
    """Settings of A*-PO; the defaults are the authors'."""

    beta1: float = flag(0.5, "V* is beta1 log mean exp(r/beta1) over the prompt's reference rewards", gt=0)
    beta2: float = flag(1e-3, "the target is pi_ref exp(r/beta2)/Z", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offline and self.beta1 != self.beta2:
            raise ValueError(
                f"--bond.offline with --bond.beta1 {self.beta1} and --bond.beta2 {self.beta2}: without samples of "
                "the policy the target must be normalised, which takes the same for both"
            )


class AStarPO(Regression):
    """The tilt is (r - V*) / beta2."""

    Config = AStarPOConfig
    config: AStarPOConfig
    scale = "beta2"

    def tilt(self, batch: AdvantageInputs) -> tuple[Tensor, dict[str, float]]:
        beta, known = self.config.beta1, batch.reference_rewards
        value = beta * ((known / beta).logsumexp(dim=-1, keepdim=True) - math.log(known.shape[-1]))
        advantage = batch.rewards - value
        return advantage / self.config.beta2, {"bond/optimal_advantage": advantage.mean().item()}
