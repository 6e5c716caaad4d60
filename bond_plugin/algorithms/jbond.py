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

Where paper and proof disagree: the paper prints G_Reg with a leading minus. Descending +gamma KL(pi || pi_anchor),
which is what Eq. 19 states, gives a plus; a test on an enumerable policy decides for it.

Ties: equal rewards are taken to be ordered at random: the best anchor sample is drawn among equals (seeded), and the
reward of Eq. 17 is its expectation over the orders. With 0/1 rewards the equation to the letter (``--bond.ties
textbook``) hardly ever fires.

That is ``--bond.n_anchor_samples 2`` (or more: the target is Best-of-m, Eq. 17 becomes -2^m log 2 and counts m - 1
times). By default no sample of the anchor is drawn: the same target, Best-of-``--bond.n`` of the anchor, is estimated
from the policy's samples alone, in the pooled form of :mod:`bond_plugin.algorithms.pooled`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.algorithms import pooled
from bond_plugin.algorithms.base import Algorithm, Needs, flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs
from bond_plugin.bestofn.baselines import centre
from bond_plugin.bestofn.estimates import win_rate
from bond_plugin.bestofn.selectors import random_argmax


@dataclass(frozen=True)
class JBONDConfig(pooled.PooledConfig):
    """beta, eta and gamma are the paper's (section 5; eta for Gemma 7B)."""

    gamma: float = flag(0.0, "coefficient of the extra KL to the anchor (Eq. 19); larger is slower", ge=0)
    estimator: str = flag(
        "auto",
        "'pooled': all samples are compared with one another, those of the anchor too if there are any; 'paper': "
        "Algorithm 2; 'auto': pooled without samples of the anchor, else paper",
        choices=("auto", "pooled", "paper"),
    )
    ties: str = flag(
        "expected",
        "rewards equal to an anchor sample's: 'expected' takes Eq. 17's expectation over random orders of "
        "equals, 'textbook' never lets them fire (Algorithm 2 alone)",
        choices=("expected", "textbook"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        m = self.n_anchor_samples
        if m < 0 or (m < 2 and not self.pooled):
            raise ValueError(
                f"--bond.n_anchor_samples must be 0 (the pooled form), or at least 2 (Best-of-1 is the anchor "
                f"itself), got {m}; any number goes with --bond.estimator pooled"
            )
        if self.pooled and self.ties != "expected":
            raise ValueError("--bond.ties textbook is Algorithm 2's: use it with --bond.n_anchor_samples 2")
        if not self.pooled and self.target != "best_of_n":
            raise ValueError(
                f"--bond.target {self.target}: Algorithm 2's reward (Eq. 17) is Best-of-N's alone: use "
                "--bond.n_anchor_samples 0, or --bond.estimator pooled"
            )
        if not self.pooled and self.n not in (2, m):
            raise ValueError(
                f"--bond.n {self.n}: Algorithm 2's target is Best-of-m, m = --bond.n_anchor_samples {m}: drop "
                "--bond.n, or use --bond.estimator pooled"
            )

    @property
    def pooled(self) -> bool:
        """Whether this is the pooled form."""
        return self.estimator == "pooled" or (self.estimator == "auto" and self.n_anchor_samples == 0)


class JBOND(Algorithm):
    """The loss is the host's own, and with samples of the anchor :func:`policy_loss`."""

    Config = JBONDConfig
    config: JBONDConfig

    def __init__(self, config: JBONDConfig) -> None:
        super().__init__(config)
        self.policy_loss = "jbond" if config.n_anchor_samples else "ppo"

    def needs(self) -> Needs:
        cfg = self.config
        m = cfg.n_anchor_samples
        return Needs(
            source_samples=m,
            selected_samples=m if cfg.pooled else 1,
            source="anchor",
            log_probs={"anchor", "reference"} if cfg.gamma_ref else {"anchor"},
            anchor_eta=cfg.eta,
            least=pooled.least(cfg, m) if cfg.pooled else 1,
        )

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """The best anchor sample of each prompt, in the pooled form all: ``[P, m]`` rewards to ``[P, f]`` indices."""
        selected = super().select if self.config.pooled else random_argmax
        return selected(source_rewards, generator)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg, m = self.config, batch.source_rewards.shape[-1]
        if cfg.pooled:
            return pooled.advantages(batch, "anchor", cfg, cfg.gamma)
        log_quantile = crude_log_quantile(batch.rewards, batch.source_rewards, cfg.ties)  # Eq. 17
        # For Best-of-m the quantile counts m - 1 times (Eq. 8 with N = m), which is once in the paper.
        log_ratio = batch.log_ratio("anchor")
        returns = (m - 1) * log_quantile - log_ratio  # Eq. 18
        advantages = cfg.beta * centre(returns, cfg.baseline) - cfg.gamma * log_ratio
        metrics = {
            "bond/fire_rate": (log_quantile / -(2**m * math.log(2))).mean().item(),
            "bond/log_quantile": log_quantile.mean().item(),
        }
        advantages = pooled.pulled(advantages, batch, cfg.gamma_ref)
        return with_selected(batch, advantages, 1.0 - cfg.beta, log_ratio, metrics)


def crude_log_quantile(rewards: Tensor, anchor_rewards: Tensor, ties: str = "expected") -> Tensor:
    """Eq. 17: with two anchor samples -log 16 where the policy's sample is worse than both, else 0.

    It is the cheapest reward whose expectation follows log p_<=: E[r] = -log 16 (1 - p)^2 equals log p at p = 1/2
    (appendix A.4). For m >= 2 anchor samples the same argument gives -2^m log 2; other m than 2 are our extension.
    With ties ``expected``, a sample that is below no anchor sample but the t it ties with is last with probability
    1 / (t + 1); with ``textbook`` a tie never fires. ``[P, n]`` and ``[P, m]`` to ``[P, n]`` in nats.
    """
    lowest = anchor_rewards.amin(dim=-1, keepdim=True)
    last = (rewards < lowest).to(rewards.dtype)
    if ties == "expected":
        equal = (rewards.unsqueeze(-1) == anchor_rewards.unsqueeze(-2)).sum(dim=-1)
        last = torch.where(rewards == lowest, 1 / (equal + 1).to(last), last)
    return last * -(2.0 ** anchor_rewards.shape[-1] * math.log(2.0))


def with_selected(
    batch: AdvantageInputs, advantages: Tensor, forward: float, log_ratio: Tensor, metrics: dict[str, float]
) -> AdvantageOutputs:
    """Advantages of the policy's samples, and ``forward`` for each selected one, for :func:`policy_loss`.

    With the metrics: the mean of ``log_ratio``, the win rate against the source, and -log pi of what is selected.
    """
    selected = batch.log_probs[:, batch.n :]
    metrics["bond/kl_anchor"] = log_ratio.mean().item()
    if batch.source_rewards.shape[-1]:
        metrics["bond/win_rate"] = win_rate(batch.rewards, batch.source_rewards).mean().item()
    if selected.shape[-1]:
        metrics["bond/forward_nll"] = -selected.mean().item()
    return AdvantageOutputs(advantages, torch.full_like(selected, forward), metrics)


def policy_loss(inputs: LossInputs) -> LossOutputs:
    """-A log pi(y) on the policy's samples, -(1 - beta) log pi(y'_Bo2) on the anchor's samples.

    While the policy is the one that drew the samples (``on_policy``) this is the paper's estimator. When a rollout is
    used for several optimiser steps, each token's log pi is replaced by PPO's clipped importance ratio pi / pi_old,
    whose gradient at pi = pi_old is the same. The anchor's samples need no ratio: the forward KL is an expectation
    under the target, whatever the policy has become.
    """
    mask = inputs.mask.to(inputs.log_probs.dtype)
    log_probs, old = inputs.within(inputs.log_probs), inputs.within(inputs.old_log_probs)
    ratio = (log_probs - old).clamp(-20, 20).exp()
    unclipped = ratio * inputs.advantages
    bounded = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high) * inputs.advantages
    plain = inputs.from_source.unsqueeze(-1) | inputs.on_policy
    objective = torch.where(plain, log_probs * inputs.advantages, torch.minimum(unclipped, bounded))
    clipped = ((bounded < unclipped) & ~plain).to(mask.dtype)
    return LossOutputs(
        row_loss=-(objective * mask).sum(dim=-1),
        clip_fraction=((clipped * mask).sum() / mask.sum().clamp(min=1)).detach(),
    )
