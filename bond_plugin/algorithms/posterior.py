"""KL-regularised RL as Bayesian inference: the posterior of the reference, given the reward. arXiv 2205.11275.

    p*(y) = pi_ref(y) exp(r(y) / c) / Z,   c = --bond.kl_coef (beta in the paper)

Three ways to it, from the policy's own samples; what is descended is in units of the reward:

    J = c [(1 - beta) KL(p* || pi) + beta KL(pi || p*)],   beta = --bond.beta as in BOND

    beta 1   backward KL: J = c KL(pi || pi_ref) - E[r] + const, which is RL with a KL penalty
    beta 0   forward KL, by the distributional policy gradient: the policy's samples, weighted by p* / pi
    between  Jeffreys' divergence

With w_i = pi_ref(y_i) / pi(y_i) exp(r_i / c), and L_i = log pi / pi_ref, the advantage of sample i is

    A_i = c (1 - beta) (w_i / Z_i - 1)  +  beta (r_i - c L_i, less the mean of the prompt's others)

Z_i is the mean of w over the prompt's *other* samples. The -1 is a baseline, as E[grad log pi] = 0: the forward part
vanishes at pi = p*, sample by sample. For L_i stands its reward-to-go (:mod:`bond_plugin.algorithms.pooled`).

Why the others. Z_i does not depend on y_i, so that a prompt's forward part has the direction of its exact gradient
for every n, and E[Z / Z_i] = 1 + O(1 / n) times its length: prompts far from p* count for more. Divided by the mean
of all n (self-normalised), it has a bias of order 1 / n that turns it. By enumeration (four responses, c = 1,
KL(p* || pi) = 0.71), at n = 4 and 8:

    self-normalised                    0.68, 0.86 of the length, turned by 16, 9 degrees
    the others                         2.9, 1.4 of the length, not turned; 1.7, 1.5 times the noise (sd / mean)
    the others, w / Z cut off at 10    1.5, 1.3 of the length, turned by 15, 3 degrees; 1.3, 1.1 times the noise

So take 8 samples or more. w / Z above ``--bond.max_weight`` is cut off: no sample makes up a whole step. At pi = p*
all are 1, so that the target stays. ``bond/truncated`` is the share that this leaves out, and ``bond/backward_kl``
how far the policy is from p*.

Without the KL (c = 0, beta 1) there is no posterior: every distribution on the best responses is an optimum, which is
the collapse that the paper predicts. Asynchronous training: the w of the others are relative to the earlier policy
that drew them; the sample's own pi / mu is left to the host's correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs
from bond_plugin.algorithms.pooled import pulled
from bond_plugin.bestofn.baselines import leave_one_out_mean
from bond_plugin.bestofn.pooled import effective_sample_size


@dataclass(frozen=True)
class PosteriorConfig(Config):
    """Settings of the posterior."""

    kl_coef: float = flag(
        0.1,
        "c: the target is pi_ref exp(r / c) / Z, which is the optimum of E[r] - c KL(pi || pi_ref). In units of the "
        "reward. 0: no KL and no target, the reward alone (needs beta 1)",
        ge=0,
    )
    beta: float = flag(
        0.5, "weight of the backward KL in the Jeffreys divergence, the forward KL has 1 - beta; 1 is RL", ge=0, le=1
    )
    max_weight: float = flag(
        10.0,
        "forward KL: weights p*/pi above this are cut off, so that no sample makes up a whole step; bond/truncated "
        "is the share of them that this leaves out; inf: never",
        ge=1,
        le=math.inf,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_coef and self.beta < 1.0:
            raise ValueError("--bond.kl_coef 0 has no target for the forward KL: use --bond.beta 1, or raise it")


class Posterior(Algorithm):
    """Advantages alone; the loss is the host's own."""

    Config = PosteriorConfig
    config: PosteriorConfig

    def needs(self) -> Needs:
        return Needs(least=2, log_probs={"reference"} if self.config.kl_coef else set())

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg = self.config
        advantages = cfg.beta * (batch.rewards - leave_one_out_mean(batch.rewards, dim=-1))
        if not cfg.kl_coef:
            return AdvantageOutputs(advantages)
        own = batch.rewards / cfg.kl_coef - batch.log_ratio("reference")  # log w
        drawn = own + batch.log_ratio("behaviour") if "behaviour" in batch.under else own
        others = drawn.unsqueeze(-2).masked_fill(torch.eye(batch.n, dtype=torch.bool), -math.inf)
        log_z = others.logsumexp(dim=-1) - math.log(batch.n - 1)
        weights = (own - log_z).exp()
        cut = weights.clamp(max=cfg.max_weight)
        advantages = advantages + cfg.kl_coef * (1 - cfg.beta) * (cut - 1)
        ess = effective_sample_size(drawn.softmax(dim=-1))
        return AdvantageOutputs(
            advantages=pulled(advantages, batch, cfg.beta * cfg.kl_coef),
            metrics={
                "bond/ess": ess.mean().item(),
                "bond/ess_min": ess.amin().item(),
                "bond/truncated": (1 - cut.sum() / weights.sum()).item(),
                "bond/backward_kl": (log_z - own).mean().item(),
            },
        )
