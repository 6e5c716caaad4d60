"""QRPO: "Quantile Reward Policy Optimization", arXiv 2507.08068.

The target is the initial policy tilted by the quantile F of the reward, F(y) = P(r(y') <= r(y)), y' ~ pi_ref:

    pi*(y) = pi_ref(y) exp(F(y) / beta) / Z,    Z = E_ref exp(F / beta)

and the policy is fitted to it by least squares (:mod:`bond_plugin.algorithms.regression`):

    (F(y) - beta log Z - beta (log pi(y) - log pi_ref(y)))^2

F is the share of the prompt's M reference rewards that are not above r(y). The target is about as far from pi_ref as
Best-of-(1/beta): log(1/beta) - 1 nats for small beta. F has steps of 1/M, so a beta far below 1/M copies the best.

log Z (``--bond.partition``):

    cache     log mean_j exp(F(r_j) / beta) over the prompt's reference rewards: the normaliser where the reference
              is those M samples, with ties or without
    uniform   log(beta (exp(1/beta) - 1)), which is log mean exp(u / beta) of a uniform u. Not the paper's log beta +
              1/beta (Eq. 11), which is off by log(1 - exp(-1/beta))

Without ties the two agree for many rewards: cache - uniform is log(h / (1 - exp(-h))), h = 1 / (M beta). With ties
uniform is too small however many there are: by 1.14 nats for a 0/1 reward with one response of four right at beta =
0.1. That matters offline; on samples of the policy log Z is a baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bond_plugin.algorithms.base import flag
from bond_plugin.algorithms.batch import AdvantageInputs
from bond_plugin.algorithms.regression import Regression, RegressionConfig
from bond_plugin.bestofn.distribution import quantiles


@dataclass(frozen=True)
class QRPOConfig(RegressionConfig):
    beta: float = flag(0.003, "the target is pi_ref exp(F/beta)/Z, about as far as Best-of-(1/beta)", gt=0)
    partition: str = flag(
        "cache",
        "log Z: 'cache', from the prompt's reference rewards, for tied rewards too; 'uniform', the closed form for "
        "rewards that are all different",
        choices=("cache", "uniform"),
    )


class QRPO(Regression):
    """The tilt is F / beta - log Z."""

    Config = QRPOConfig
    config: QRPOConfig
    scale = "beta"

    def tilt(self, batch: AdvantageInputs) -> tuple[Tensor, dict[str, float]]:
        beta, known = self.config.beta, batch.reference_rewards
        p_lt, p_le = quantiles(batch.rewards, known)
        log_z = uniform_log_partition(beta)
        if self.config.partition == "cache":
            _, of_known = quantiles(known, known)
            log_z = (of_known / beta).logsumexp(dim=-1, keepdim=True) - math.log(known.shape[-1])
        return p_le / beta - log_z, {"bond/quantile": ((p_lt + p_le) / 2).mean().item()}


def uniform_log_partition(beta: float) -> float:
    """log E exp(u / beta), u uniform in [0, 1], for any beta > 0 without overflow; in nats."""
    return 1 / beta + math.log(beta) + math.log(-math.expm1(-1 / beta))
