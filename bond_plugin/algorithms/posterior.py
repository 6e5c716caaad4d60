"""KL-regularised RL as Bayesian inference: the posterior of the reference, given the reward. arXiv 2205.11275.

    p*(y) = pi_ref(y) exp(r(y) / c) / Z,   c = --bond.kl_coef (beta in the paper)

What is descended, from the policy's own samples and in units of the reward, is

    J = c [(1 - beta) KL(p* || pi) + beta KL(pi || p*)],   beta = --bond.beta as in BOND

    beta 1   backward KL: J = c KL(pi || pi_ref) - E[r] + const, which is RL with a KL penalty
    beta 0   forward KL, by the distributional policy gradient: the policy's samples, weighted by p* / pi

With w_i = pi_ref(y_i) / pi(y_i) exp(r_i / c), and L_i = log pi / pi_ref, the advantage of sample i is

    A_i = c (1 - beta) (w_i / Z_i - 1)  +  beta (r_i - c L_i, less the mean of the prompt's others)

The -1 is a baseline, as E[grad log pi] = 0; for L_i stands its reward-to-go. Z_i is the mean of w over the prompt's
*other* samples, so that a prompt's forward part has the direction of its exact gradient for every n, and 1 + O(1 / n)
times its length; divided by the mean of all n it would be turned (docs/papers.md has numbers: take 8 samples or
more). w / Z above ``--bond.max_weight`` is cut off; at pi = p* all are 1, so that the target stays.

Without the KL (c = 0, beta 1) every distribution on the best responses is an optimum, the collapse that the paper
predicts. Asynchronous training: the w of the others are relative to the policy that drew them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, Config, Needs, flag
from bond_plugin.algorithms.pooled import ess_metrics, max_weight_flag, pulled
from bond_plugin.bestofn.baselines import leave_one_out_log_mean, leave_one_out_mean


@dataclass(frozen=True)
class PosteriorConfig(Config):
    kl_coef: float = flag(
        0.1,
        "c: the target is pi_ref exp(r / c) / Z, which is the optimum of E[r] - c KL(pi || pi_ref). In units of the "
        "reward. 0: no KL and no target, the reward alone (needs beta 1)",
        ge=0,
    )
    beta: float = flag(
        0.5, "weight of the backward KL in the Jeffreys divergence, the forward KL has 1 - beta; 1 is RL", ge=0, le=1
    )
    max_weight: float = max_weight_flag("forward KL: weights p*/pi", "them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_coef and self.beta < 1.0:
            raise ValueError("--bond.kl_coef 0 has no target for the forward KL: use --bond.beta 1, or raise it")


class Posterior(Algorithm):
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
        log_z = leave_one_out_log_mean(drawn)
        weights = (own - log_z).exp()
        cut = weights.clamp(max=cfg.max_weight)
        advantages = advantages + cfg.kl_coef * (1 - cfg.beta) * (cut - 1)
        return AdvantageOutputs(
            advantages=pulled(advantages, batch, cfg.beta * cfg.kl_coef),
            metrics={
                **ess_metrics(drawn.softmax(dim=-1)),
                "bond/truncated": (1 - cut.sum() / weights.sum()).item(),
                "bond/backward_kl": (log_z - own).mean().item(),
            },
        )
