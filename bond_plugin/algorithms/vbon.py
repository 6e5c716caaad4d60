"""vBoN: "Variational Best-of-N Alignment", arXiv 2407.06057.

The backward KL to Best-of-N of the initial policy, as KL-regularised RL with a transformed reward:

    minimise KL(pi || pi_BoN)  <=>  maximise E[r_vBoN(y)] - KL(pi || pi_ref) / (N - 1)

    l1      r = log F(r(y))                                             the lower bound L1
    exact   r = (log sum_i C(N, i) F^(N-i) pi_ref^i - log pi_ref) / (N - 1)
    tied    r = (log pi_BoN - log pi_ref) / (N - 1), ties broken at random (Theorem 1 of BOND, 2407.14622)

F(r(y)) is the probability that a sample of the initial policy has a lower reward, estimated from M samples that
were scored before training: with k of them strictly below, F = (k + 1) / (M + 1), as in the authors' code. Only
the order of rewards counts: any increasing transformation of the reward gives the same training.

Everything else is the host's: its advantages (the paper trains with PPO, ``gae``), its policy loss, its KL
penalty in the reward with the coefficient 1 / (N - 1).

Where paper's code and proof disagree: the authors divide the exact reward by N and keep the coefficient
1 / (N - 1). The optimum is Best-of-N itself only with N - 1 in both places; this file follows the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bond_plugin.algorithms.base import (
    AdvantageInputs,
    Needs,
    RewardTransform,
    TransformConfig,
    TransformOutputs,
    flag,
    reward_cache_flag,
)
from bond_plugin.bestofn.distribution import quantiles
from bond_plugin.bestofn.rewards import bond_reward, vbon_reward


@dataclass(frozen=True)
class VBoNConfig(TransformConfig):
    """Settings of vBoN."""

    n: int = flag(8, "N of the Best-of-N to match, >= 2; it sets the KL coefficient to 1 / (N - 1)")
    bound: str = flag(
        "l1",
        "the reward: 'l1' is log F, the paper's lower bound; 'exact' adds what pi_ref(y) itself contributes; "
        "'tied' is exact where many samples share a reward, as with 0/1 rewards",
        choices=("l1", "exact", "tied"),
    )
    reward_cache: str = reward_cache_flag()

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"--vbon.n must be at least 2 (Best-of-1 is the initial policy), got {self.n}")
        if not self.reward_cache:
            raise ValueError(
                "vBoN needs --bond.reward_cache, rewards of the initial policy's samples: make it with `bond cache` "
                "and the flags of this run"
            )


class VBoN(RewardTransform):
    """The rewards of vBoN."""

    Config = VBoNConfig
    config: VBoNConfig

    @property
    def kl_coefficient(self) -> float:
        return 1.0 / (self.config.n - 1)

    def needs(self) -> Needs:
        return Needs(log_probs={"reference"}, reward_cache=True)

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        cfg = self.config
        p_lt, p_le = quantiles(batch.rewards, batch.reference_rewards, include_self=True)
        # (k + 1) / (M + 1), k strictly below: what the authors count, and never 0.
        below = p_lt + 1 / (batch.reference_rewards.shape[-1] + 1)
        if cfg.bound == "tied":
            rewards = bond_reward(p_lt, p_le, cfg.n)
        elif cfg.bound == "exact":
            rewards = vbon_reward(below.log(), batch.under["reference"].sum(dim=-1), cfg.n)
        else:
            rewards = below.log()
        if not torch.isfinite(rewards).all():
            raise FloatingPointError("a reward of vBoN is not finite: a log-probability of the reference is not")
        return TransformOutputs(
            rewards,
            {
                "vbon/reward": rewards.mean().item(),
                "bond/quantile": ((p_lt + p_le) / 2).mean().item(),
                "bond/log_quantile": p_le.log().mean().item(),
            },
        )
