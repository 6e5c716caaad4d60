"""vBoN: "Variational Best-of-N Alignment", arXiv 2407.06057.

The backward KL to Best-of-N of the initial policy, as KL-regularised RL with a transformed reward:

    minimise KL(pi || pi_BoN)  <=>  maximise E[r_vBoN(y)] - KL(pi || pi_ref) / (N - 1)

    l1      r = log F(r(y))                                             the lower bound L1
    exact   r = (log sum_i C(N, i) F^(N-i) pi_ref^i - log pi_ref) / (N - 1)
    tied    r = (log pi_BoN - log pi_ref) / (N - 1), ties broken at random (Theorem 1 of BOND, 2407.14622)

By the binomial theorem the sum is (F + pi_ref)^N - F^N: Best-of-N for a y that is alone at its level of reward.
F(r(y)) is the probability that a sample of the initial policy has a lower reward, estimated from M samples that
were scored before training: with k of them strictly below, F = (k + 1) / (M + 1), as in the authors' code. The rest
is the host's: its advantages (the paper trains with PPO, ``gae``), policy loss, and KL penalty with 1 / (N - 1).

``--vbon.target`` has other targets pi_ref g(F) of the same kind (:mod:`bond_plugin.bestofn.targets`): the reward is
log g / c of the same three kinds, with the KL coefficient 1 / c; c is mu for Best-of-Poisson and 1 / T for the
exponential tilt, whose reward is F itself but for a constant. There F is the share k / M, as g(0) is not 0.

Where paper's code and proof disagree: the authors divide the exact reward by N and keep the coefficient
1 / (N - 1). The optimum is Best-of-N itself only with N - 1 in both places; this file follows the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

from bond_plugin.algorithms import base
from bond_plugin.algorithms.base import Needs, RewardTransform, flag
from bond_plugin.algorithms.batch import AdvantageInputs, TransformOutputs
from bond_plugin.bestofn.distribution import quantiles


@dataclass(frozen=True)
class VBoNConfig(base.Targeted, base.TransformConfig):
    prefix = "vbon"
    n: float = base.n_flag(8, "N of the Best-of-N to match, >= 2; it sets the KL coefficient to 1 / (N - 1)")
    bound: str = flag(
        "l1",
        "the reward: 'l1' is log F, the paper's lower bound; 'exact' adds what pi_ref(y) itself contributes; "
        "'tied' is exact where many samples share a reward, as with 0/1 rewards",
        choices=("l1", "exact", "tied"),
    )
    reward_cache: str = base.reward_cache_flag()

    def __post_init__(self) -> None:
        _ = self.goal
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
        return 1.0 / self.config.goal.scale

    def needs(self) -> Needs:
        return Needs(log_probs={"reference"}, reward_cache=True)

    def transform(self, batch: AdvantageInputs) -> TransformOutputs:
        cfg, goal, known = self.config, self.config.goal, batch.reference_rewards
        p_lt, p_le = quantiles(batch.rewards, known, include_self=True)
        low, high = (p_lt, p_le) if goal.vanishes else quantiles(batch.rewards, known)
        if goal.vanishes and cfg.bound != "tied":
            low = low + 1 / (known.shape[-1] + 1)  # (k + 1) / (M + 1), k strictly below: never 0
        if goal.vanishes and cfg.bound == "l1":
            rewards = low.log()  # log g / c but for a constant
        else:
            log_ref = batch.under["reference"].sum(dim=-1)
            # Of y's level (tied), of y's own mass above F (exact), or without any mass (l1).
            high = {"l1": low, "exact": low + log_ref.exp(), "tied": high}[cfg.bound]
            rewards = goal.log_tilt(low, high) / goal.scale
        metrics = {
            "vbon/reward": rewards.mean().item(),
            "bond/quantile": ((p_lt + p_le) / 2).mean().item(),
            "bond/log_quantile": p_le.log().mean().item(),
        }
        return TransformOutputs(rewards, metrics)
