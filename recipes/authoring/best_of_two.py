"""An algorithm to begin with, explained in docs/authoring.md: Best-of-2 of the policy itself, held near the start.

The target is Best-of-2 of the policy, the divergence the forward KL, and the samples are the policy's own:

    minimise  KL(Best-of-2 || pi) + pull KL(pi || initial policy)        the target held fixed at each step

Of n samples of a prompt, share_i is the share of the others that y_i beats; an equal one counts one half. 2 share_i
estimates the density of Best-of-2 relative to pi, without bias. So the advantage of y_i is 2 share_i - 1, less the
part of the KL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, Config, Needs, flag


@dataclass(frozen=True)
class BestOfTwoConfig(Config):
    """Each field is a flag, here ``--bond.pull``. Wrong values raise ``ValueError`` and stop before Ray starts."""

    pull: float = flag(0.1, "coefficient of KL(pi || initial policy)", ge=0)


class BestOfTwo(Algorithm):
    """With the host's own rollouts and its own PPO loss; ``policy_loss`` would name another, ``"own"`` a method."""

    Config = BestOfTwoConfig
    config: BestOfTwoConfig

    def needs(self) -> Needs:
        """At least two samples of the policy a prompt, and log pi_initial of them."""
        return Needs(least=2, log_probs={"reference"})

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """From ``[P, n]`` rewards and log-probabilities to ``[P, n]`` advantages."""
        rewards, n = batch.rewards, batch.rewards.shape[-1]
        difference = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
        share = (torch.sign(difference).sum(dim=-1) / (n - 1) + 1) / 2
        log_ratio = batch.log_ratio("reference")
        centred = (log_ratio - log_ratio.mean(dim=-1, keepdim=True)) * n / (n - 1)
        return AdvantageOutputs(
            advantages=2 * share - 1 - self.config.pull * centred,
            metrics={"best_of_two/spread": share.std().item()},
        )
