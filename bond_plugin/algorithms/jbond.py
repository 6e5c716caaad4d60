"""J-BOND: Algorithm 2 of "BOND: Aligning LLMs with Best-of-N Distillation", arXiv 2407.14622.

For each prompt, one sample y of the policy (or n), two samples y'_1, y'_2 of the anchor, all scored:

    y'_Bo2 = argmax r(y'_i)                                               best of the anchor's samples
    G_FW   = -grad log pi(y'_Bo2)                                         forward KL, line 6
    r      = -log 16 if r(y) < min_i r(y'_i) else 0                       Eq. 17
    R      = r - (log pi(y) - log pi_anchor(y))                           Eq. 18
    G_BW   = -grad log pi(y) (R - B)                                      backward KL
    G_Reg  = +grad log pi(y) (log pi(y) - log pi_anchor(y))               Eq. 19
    G      = (1 - beta) G_FW + beta G_BW + gamma G_Reg
    theta_anchor <- (1 - eta) theta_anchor + eta theta                    each optimiser step

so that, written for one sample of each kind, the loss is

    -(1 - beta) log pi(y'_Bo2)  -  A log pi(y),     A = beta (R - B) - gamma (log pi(y) - log pi_anchor(y))

with A held fixed. log pi is the sum over the tokens of the response.

Where paper and proof disagree: the paper prints G_Reg with a leading minus. Descending +gamma KL(pi ||
pi_anchor), which is what Eq. 19 states, gives the score-function gradient with a plus; a test on an
enumerable policy decides for the plus.

Ties: Theorem 1 assumes a strict order of rewards. Equal rewards are taken to be ordered at random: the best
anchor sample is drawn among equals (seeded), and the reward of Eq. 17 is its expectation over the orders. With
0/1 rewards the equation to the letter (``--bond.ties textbook``) hardly ever fires.

Beyond the paper: G_FW is the gradient of one response a prompt, without a baseline. ``--bond.forward_baseline``
gives it one and trains on all m samples of the anchor. Token t of y'_i has

    G_FW   = -sum_i (1[y'_i is the best] - rho_it / m) grad log pi(y'_it),   rho_it = pi(y'_it) / pi_anchor(y'_it)

What is added has expectation 0: after any beginning, sum_v pi_anchor(v) rho(v) grad log pi(v) = grad sum_v pi(v).
Where the policy still is the anchor, the better of two gets +1/2 and the other -1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.algorithms.base import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    Config,
    LossInputs,
    LossOutputs,
    Samples,
    flag,
)
from bond_plugin.bestofn.divergences import BASELINES, backward_kl
from bond_plugin.bestofn.rewards import jbond_reward, strict_ranks


@dataclass(frozen=True)
class JBONDConfig(Config):
    """Settings of J-BOND. The defaults are the paper's (section 5; eta for Gemma 7B)."""

    beta: float = flag(
        0.5, "weight of the backward KL in the Jeffreys divergence, in [0, 1]; the forward KL has 1 - beta"
    )
    eta: float = flag(0.02, "step of the anchor's moving average, anchor <- (1 - eta) anchor + eta policy, in [0, 1]")
    gamma: float = flag(0.0, "coefficient of the extra KL to the anchor (Eq. 19), >= 0; larger is slower")
    n_anchor_samples: int = flag(
        2,
        "samples of the anchor per prompt, >= 2. The target is Best-of-this-many of the anchor; the paper's is 2",
    )
    baseline: str = flag(
        "batch",
        "baseline B of the backward term: 'batch', the mean return of the other samples in the rollout batch; "
        "'leave_one_out', of the prompt's other samples; or 'none'",
        choices=BASELINES,
    )
    ties: str = flag(
        "expected",
        "rewards equal to an anchor sample's: 'expected' takes Eq. 17's expectation over random orders of "
        "equals, 'textbook' never lets them fire",
        choices=("expected", "textbook"),
    )
    forward_baseline: bool = flag(
        False,
        "give the forward term a baseline, and train on all samples of the anchor instead of the best alone: "
        "the same gradient in expectation, with less noise; not in the paper",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"--bond.beta must lie in [0, 1], got {self.beta}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"--bond.eta must lie in [0, 1], got {self.eta}")
        if not (self.gamma >= 0.0 and math.isfinite(self.gamma)):
            raise ValueError(f"--bond.gamma must be at least 0, got {self.gamma}")
        if self.n_anchor_samples < 2:
            raise ValueError(
                f"--bond.n_anchor_samples must be at least 2 (Best-of-1 is the anchor itself), got "
                f"{self.n_anchor_samples}"
            )


class JBOND(Algorithm):
    """The advantages of J-BOND; :func:`policy_loss` is its loss."""

    Config = JBONDConfig
    policy_loss = "jbond"
    config: JBONDConfig

    def samples(self) -> Samples:
        return Samples(
            companions=self.config.n_anchor_samples,
            trained_companions=self.config.n_anchor_samples if self.config.forward_baseline else 1,
            source="anchor",
            source_log_probs=True,
            anchor_eta=self.config.eta,
        )

    def select(self, companion_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """The best anchor sample of each prompt, or all of them: ``[P, m]`` rewards to ``[P, f]`` indices."""
        if self.config.forward_baseline:
            return torch.arange(companion_rewards.shape[-1]).expand(companion_rewards.shape)
        return strict_ranks(companion_rewards, generator).argmax(dim=-1, keepdim=True)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg = self.config
        if batch.source_log_probs is None:
            raise ValueError("J-BOND needs log pi_anchor of the policy's samples")
        m = batch.companion_rewards.shape[-1]

        log_quantile = jbond_reward(batch.rewards, batch.companion_rewards, cfg.ties)  # Eq. 17
        # Eq. 18: the return R is minus what backward_kl takes the mean of. For Best-of-m the quantile counts
        # m - 1 times (Eq. 8 with N = m), which is once in the paper.
        log_ratio = batch.log_probs - batch.source_log_probs
        backward = backward_kl(log_ratio, (m - 1) * log_quantile, cfg.baseline)
        advantages = -cfg.beta * backward.weights - cfg.gamma * log_ratio
        best = torch.ones_like(batch.companion_log_probs)
        companion_baseline = None
        if cfg.forward_baseline:
            # Equals share, which is the mean over their random orders. The mean over the m rows divides by m.
            top = (batch.companion_rewards == batch.companion_rewards.amax(dim=-1, keepdim=True)).double()
            best = m * top / top.sum(dim=-1, keepdim=True)
            companion_baseline = torch.full_like(best, 1.0 - cfg.beta)

        wins = (batch.rewards.unsqueeze(-1) > batch.companion_rewards.unsqueeze(-2)).double()
        draws = (batch.rewards.unsqueeze(-1) == batch.companion_rewards.unsqueeze(-2)).double()
        return AdvantageOutputs(
            advantages=advantages,
            companion_advantages=(1.0 - cfg.beta) * best,
            companion_baseline=companion_baseline,
            metrics={
                "bond/win_rate": (wins + 0.5 * draws).mean().item(),
                "bond/fire_rate": (log_quantile / -(2**m * math.log(2))).mean().item(),
                "bond/log_quantile": log_quantile.mean().item(),
                "bond/kl_anchor": log_ratio.mean().item(),
                "bond/forward_nll": -(best * batch.companion_log_probs).mean().item(),
            },
        )


def policy_loss(inputs: LossInputs) -> LossOutputs:
    """-A log pi(y) on the policy's samples, -(1 - beta) log pi(y'_Bo2) on the anchor's best, less the control.

    While the policy is the one that drew the samples (``on_policy``), this is the paper's estimator as it
    stands. When a rollout is used for several optimiser steps, the policy's samples were drawn by an older
    policy: each token's log pi is then replaced by PPO's clipped importance ratio pi / pi_old, whose
    gradient at pi = pi_old is the same. The anchor's samples need no ratio: the forward KL is an
    expectation under the target, whatever the policy has become.
    """
    mask = inputs.mask.to(inputs.log_probs.dtype)
    # Log-probabilities are 0 outside the mask, but padding can carry anything: select, do not multiply.
    log_probs = torch.where(inputs.mask.bool(), inputs.log_probs, 0.0)
    old = torch.where(inputs.mask.bool(), inputs.old_log_probs, 0.0)
    ratio = (log_probs - old).clamp(-20, 20).exp()
    weights = inputs.advantages
    if inputs.control is not None:  # pi_old / pi_source becomes pi / pi_source
        weights = weights - inputs.control * ratio.detach()
    plain = log_probs * weights
    if inputs.on_policy:
        objective, clipped = plain, torch.zeros_like(plain)
    else:
        unclipped = ratio * inputs.advantages
        bounded = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high) * inputs.advantages
        companion = inputs.companion.unsqueeze(-1)
        objective = torch.where(companion, plain, torch.minimum(unclipped, bounded))
        clipped = ((bounded < unclipped) & ~companion).to(plain.dtype)
    return LossOutputs(
        row_loss=-(objective * mask).sum(dim=-1),
        clip_fraction=((clipped * mask).sum() / mask.sum().clamp(min=1)).detach(),
    )
