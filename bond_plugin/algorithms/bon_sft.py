"""Best-of-N supervised fine-tuning: the forward KL alone, with an optional KL to the reference.

    KL(pi_BoN || pi) + kl_coef KL(pi || pi_ref)

The first term's gradient is -grad log pi(y'_BoN) on the best of N samples of the initial policy (section 4.1 of
BOND, arXiv 2407.14622, at beta = 0). It is RAFT (arXiv 2304.06767) with a fixed reference, and the baseline
"BoN-SFT" of vBoN (arXiv 2407.06057). The second term, on samples of the policy, is what reviewers of vBoN asked
to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs
from bond_plugin.algorithms.jbond import with_selected
from bond_plugin.bestofn.baselines import BASELINES, centre
from bond_plugin.bestofn.selectors import random_argmax


@dataclass(frozen=True)
class BoNSFTConfig(Config):
    n: int = flag(8, "N: samples of the initial policy a prompt, of which the best is imitated", ge=2)
    kl_coef: float = flag(0.0, "coefficient of KL(pi || pi_ref). 0 is RAFT's plain fine-tuning", ge=0)
    baseline: str = flag(
        "batch",
        "baseline of the KL's gradient: 'batch', the mean over the other samples in the rollout batch; "
        "'leave_one_out', over the prompt's other samples; or 'none'",
        choices=BASELINES,
    )


class BoNSFT(Algorithm):
    """The policy's own samples enter the loss through the KL alone; with ``kl_coef`` 0 they are only measured."""

    Config = BoNSFTConfig
    policy_loss = "jbond"
    config: BoNSFTConfig

    def needs(self) -> Needs:
        return Needs(source_samples=self.config.n, selected_samples=1, source="reference", log_probs={"reference"})

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """The best of a prompt's source samples: ``[P, n]`` rewards to ``[P, 1]`` indices. Ties at random."""
        return random_argmax(source_rewards, generator)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        log_ratio = batch.log_ratio("reference")
        weights = centre(log_ratio, self.config.baseline) if self.config.kl_coef else torch.zeros_like(log_ratio)
        return with_selected(batch, -self.config.kl_coef * weights, 1.0, log_ratio, {})
