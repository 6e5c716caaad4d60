"""Regression of the policy to a target that is known response by response: what QRPO and A*-PO share.

With log pi*(y) = log pi_ref(y) + tilt(y) the loss of a response, made anew at each optimiser step, is

    beta^2 (log pi(y) - log pi*(y))^2

Where the responses come from decides what a constant in the tilt, such as log Z, does:

    the policy      At the weights that drew them the expected gradient is 2 beta^2 times that of KL(pi || pi*). A
                    constant is a baseline (E[grad log pi] = 0) and changes the noise alone.
    --bond.offline  Responses of the initial policy that the reward cache has stored; nothing is sampled. The loss is
                    zero at pi*, if that is normalised; so the constant counts. log pi_ref is what is stored with the
                    responses: the loss needs no reference weights (--no-bond.kl_ref does without them altogether).

Further optimiser steps on a rollout are the same regression on samples of an earlier policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag, reward_cache_flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs


@dataclass(frozen=True)
class RegressionConfig(Config):
    offline: bool = flag(
        False,
        "train on the responses that the reward cache has stored (`bond cache --cache.log_probs`) and sample nothing",
    )
    reward_cache: str = reward_cache_flag(
        "a file of rewards of the initial policy's samples, made by `bond cache` with the flags of this run"
    )


class Regression(Algorithm):
    """What stands in the advantages' place is log pi*(y), token by token: log pi_ref, and the tilt on the first."""

    Config = RegressionConfig
    policy_loss = "own"
    config: RegressionConfig
    scale: str  #: The name of the setting that is beta.

    def tilt(self, batch: AdvantageInputs) -> tuple[Tensor, dict[str, float]]:
        """log pi*(y) - log pi_ref(y), ``[P, n]``, in nats; and metrics."""
        raise NotImplementedError

    def needs(self) -> Needs:
        offline = self.config.offline
        return Needs(offline=offline, log_probs=() if offline else {"reference"}, reward_cache=True)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        name = "behaviour" if self.config.offline else "reference"
        tilt, metrics = self.tilt(batch)
        log_ratio = batch.log_ratio(name)
        target = batch.under[name].clone()
        target[..., 0] += tilt
        metrics |= {
            "bond/log_ratio": log_ratio.mean().item(),
            "bond/residual": (log_ratio - tilt).square().mean().sqrt().item(),
        }
        return AdvantageOutputs(target, metrics=metrics)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        rest = inputs.within(inputs.log_probs - inputs.advantages).sum(dim=-1)
        return LossOutputs((getattr(self.config, self.scale) * rest).square())
