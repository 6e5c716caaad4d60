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

``--vbon.target`` has other targets pi_ref g(F) of the same kind (:mod:`bond_plugin.bestofn.targets`): the reward is
log g / c of the same three kinds, with the KL coefficient 1 / c; c is mu for Best-of-Poisson and 1 / T for the
exponential tilt, whose reward is F itself but for a constant. There F is the share k / M, as g(0) is not 0.

Where paper's code and proof disagree: the authors divide the exact reward by N and keep the coefficient
1 / (N - 1). The optimum is Best-of-N itself only with N - 1 in both places; this file follows the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.algorithms.base import (
    AdvantageInputs,
    Needs,
    RewardTransform,
    TransformConfig,
    TransformOutputs,
    flag,
    reward_cache_flag,
    target_flag,
    temperature_flag,
)
from bond_plugin.bestofn.distribution import quantiles
from bond_plugin.bestofn.rewards import bond_reward, vbon_reward
from bond_plugin.bestofn.targets import BestOfN, Target, target_of
from bond_plugin.options import number


@dataclass(frozen=True)
class VBoNConfig(TransformConfig):
    """Settings of vBoN."""

    n: float = flag(
        8,
        "N of the Best-of-N to match, >= 2; it sets the KL coefficient to 1 / (N - 1). Of Best-of-Poisson the mean "
        "number of samples, 1 + mu, above 1 and not necessarily whole",
        type=number,
    )
    target: str = target_flag()
    temperature: float = temperature_flag()
    bound: str = flag(
        "l1",
        "the reward: 'l1' is log F, the paper's lower bound; 'exact' adds what pi_ref(y) itself contributes; "
        "'tied' is exact where many samples share a reward, as with 0/1 rewards",
        choices=("l1", "exact", "tied"),
    )
    reward_cache: str = reward_cache_flag()

    def __post_init__(self) -> None:
        _ = self.goal
        if not self.reward_cache:
            raise ValueError(
                "vBoN needs --bond.reward_cache, rewards of the initial policy's samples: make it with `bond cache` "
                "and the flags of this run"
            )

    @property
    def goal(self) -> Target:
        """The target. Raises ValueError where its numbers are out of range."""
        return target_of(self.target, self.n, self.temperature, "vbon")


class VBoN(RewardTransform):
    """The rewards of vBoN."""

    Config = VBoNConfig
    config: VBoNConfig

    @property
    def kl_coefficient(self) -> float:
        return 1.0 / self.config.goal.scale

    def needs(self) -> Needs:
        return Needs(log_probs={"reference"}, reward_cache=True)

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        cfg, log_ref = self.config, batch.under["reference"].sum(dim=-1)
        goal, pool = cfg.goal, batch.reference_rewards
        p_lt, p_le = quantiles(batch.rewards, pool, include_self=True)
        if not isinstance(goal, BestOfN):
            rewards = _reward(goal, cfg.bound, *quantiles(batch.rewards, pool), log_ref)
        elif cfg.bound == "tied":
            rewards = bond_reward(p_lt, p_le, goal.n)
        else:
            # (k + 1) / (M + 1), k strictly below: what the authors count, and never 0.
            below = (p_lt + 1 / (pool.shape[-1] + 1)).log()
            rewards = vbon_reward(below, log_ref, goal.n) if cfg.bound == "exact" else below
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


def _reward(goal: Target, bound: str, p_lt: Tensor, p_le: Tensor, log_ref: Tensor) -> Tensor:
    """log g / scale, of a level of reward (tied), of y's own mass above p_< (exact), or without any mass (l1)."""
    upper = {"l1": p_lt, "exact": p_lt + log_ref.exp(), "tied": p_le}[bound]
    return goal.log_tilt(p_lt, upper) / goal.scale
