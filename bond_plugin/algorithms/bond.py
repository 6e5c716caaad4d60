"""BOND and iterative BOND: section 4 and Algorithm 1 of "BOND: Aligning LLMs with Best-of-N Distillation",
arXiv 2407.14622.

The target is Best-of-N of an anchor, the divergence Jeffreys' (Eq. 11):

    J_beta = (1 - beta) KL(pi_BoN || pi) + beta KL(pi || pi_BoN)

For each prompt, samples y of the policy and y'_1 ... y'_k of the anchor, all scored:

    forward    -grad log pi(y'_BoN),  y'_BoN = the best of N of the anchor's samples
    p_<, p_<=  shares of the anchor's samples below, or not above, r(y)                  Eq. 10
    r_BOND     log p_<= + 1/(N-1) log sum_{i=1..N} (p_< / p_<=)^(i-1)                    Eq. 8
    backward   -(N-1) grad log pi(y) (r_BOND(y) - (log pi(y) - log pi_anchor(y)) / (N-1) - B)   Eq. 14, 15

Iterative BOND is Algorithm 1 (``--bond.anchor periodic``): Best-of-n of Best-of-n is Best-of-n^2, so a small n
reaches far. Three differences to the paper, each for a reason:

* Quantiles count y itself as one of k + 1 samples of the anchor: p_<= = (#{not above} + 1) / (k + 1). Eq. 10
  gives p_<= = 0, and a reward of minus infinity, to any sample below all k.
* The sum in r_BOND, term (B), is kept unless ``--no-bond.correction``; the paper leaves it out in practice. Kept, the
  formula is exact for tied rewards with ties broken at random; left out, the target is another one where rewards tie.
* The gradient is that of J_beta as written above, so the backward term has the factor N - 1.

Without samples of the anchor (``--bond.n_anchor_samples 0``) both terms are estimated from the policy's own samples,
in the pooled form of :mod:`bond_plugin.algorithms.pooled`; g and its logarithm come from the other samples, or from
``--bond.reward_cache``. Under a fixed anchor it reaches a few nats, as its weights are worth less the further the
policy is away (``bond/ess``).

``--bond.target`` has other targets (:mod:`bond_plugin.bestofn.targets`): log g in the place of (N - 1) r_BOND, and
for the forward term the best of a random number n of the anchor's samples. As g(0) is not 0, their quantiles do not
count y itself.

Learned quantiles (appendix B.1): p_<=(x, y) is a sequence classifier in the host's critic slot, trained by
binary cross-entropy (Eq. 25) on 1{r(y') <= r(y)} while the policy is trained. It learns p_<= alone, so term (B)
is left out with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.algorithms import pooled
from bond_plugin.algorithms.base import Algorithm, Needs, Source, flag, n_flag, reward_cache_flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs
from bond_plugin.algorithms.jbond import with_selected
from bond_plugin.bestofn.baselines import centre
from bond_plugin.bestofn.distribution import quantiles
from bond_plugin.bestofn.selectors import random_argmax
from bond_plugin.bestofn.targets import BestOfN


@dataclass(frozen=True)
class BONDConfig(pooled.PooledConfig):
    """The paper's: n in {4, 8, 16}, 16 samples for the quantile, beta 0.5 (section 4)."""

    n: float = n_flag(8, "N: the target is Best-of-N of the anchor, >= 2. With a moving anchor, 2 or 4")
    eta: float = flag(0.02, "step of the moving average under --bond.anchor ema", ge=0, le=1)
    n_anchor_samples: int = flag(
        16,
        "k: samples of the anchor per prompt for the quantile, and at least n while beta < 1. With a reward cache or "
        "a learned quantile only what the forward term needs is drawn. 0: none, the policy's own samples are "
        "weighted (pooled form)",
        ge=0,
    )
    anchor: str = flag(
        "fixed",
        "'fixed': the initial policy (BOND); 'periodic': a copy of the policy every anchor_interval steps "
        "(iterative BOND); 'ema': a moving average with step eta",
        choices=("fixed", "periodic", "ema"),
    )
    anchor_interval: int = flag(
        50, "optimiser steps between two copies of the policy (paper: 1000 on XSum, 50 on Gemma)", ge=1
    )
    correction: bool = flag(
        True, "keep term (B) of Theorem 1 in the reward: needed for tied rewards; the paper leaves it out"
    )
    quantile: str = flag(
        "monte_carlo",
        "p_<=: 'monte_carlo', from the anchor's samples (Eq. 10); 'learned', a classifier in the critic slot "
        "(Eq. 25; see --critic.*)",
        choices=("monte_carlo", "learned"),
    )
    reward_cache: str = reward_cache_flag()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooled and self.quantile == "learned":
            raise ValueError(
                "--bond.quantile learned is trained on samples of the anchor: use --bond.n_anchor_samples 1"
            )
        if self.quantile == "learned" and self.correction:
            raise ValueError(
                "--bond.quantile learned knows p_<= alone, so term (B) cannot be kept: add --no-bond.correction"
            )
        if self.reward_cache and self.anchor != "fixed":
            raise ValueError(
                f"--bond.reward_cache holds rewards of the initial policy, but --bond.anchor {self.anchor} moves "
                "away from it: drop one of the two"
            )
        if self.reward_cache and self.quantile == "learned":
            raise ValueError("--bond.reward_cache and --bond.quantile learned are two ways to the same quantile")
        drawn_for_quantile = self.quantile == "monte_carlo" and not self.reward_cache and not self.pooled
        enough = self.goal.samples
        if drawn_for_quantile and self.beta < 1 and self.n_anchor_samples < enough:
            needed, why = f"--bond.n {self.n}", "of n of them"
            if self.target != "best_of_n":
                needed, why = str(enough), f"of n of them, a random n which is above {enough} in 1 % at most"
            raise ValueError(
                f"--bond.n_anchor_samples {self.n_anchor_samples} is less than {needed}: the forward term "
                f"needs the best {why}. Raise it, use --bond.beta 1.0, or draw none (0, the pooled form)"
            )


class BOND(Algorithm):
    """Its loss is J-BOND's: -A log pi on samples of the policy and on the best of N."""

    Config = BONDConfig
    config: BONDConfig

    def __init__(self, config: BONDConfig) -> None:
        super().__init__(config)
        self.policy_loss = "jbond" if self.needs().source_samples else "ppo"

    @property
    def _source(self) -> Source:
        return "reference" if self.config.anchor == "fixed" else "anchor"

    def needs(self) -> Needs:
        cfg = self.config
        forward = cfg.beta < 1 and not cfg.pooled
        if cfg.quantile == "monte_carlo" and not cfg.reward_cache:
            drawn = cfg.n_anchor_samples
        else:
            # One is enough for the classifier's label (appendix B.1); a cache needs none.
            drawn = cfg.goal.samples if forward else int(cfg.quantile == "learned")
        return Needs(
            source_samples=drawn,
            selected_samples=int(forward),
            source=self._source,
            log_probs={self._source, "reference"} if cfg.gamma_ref else {self._source},
            anchor_eta=cfg.eta if cfg.anchor == "ema" else None,
            anchor_interval=cfg.anchor_interval if cfg.anchor == "periodic" else None,
            reward_cache=bool(cfg.reward_cache),
            classifier=cfg.quantile == "learned",
            least=pooled.least(cfg, 0) if cfg.pooled and not cfg.reward_cache else 1,
        )

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        """The best of the first n source samples: ``[P, m]`` rewards to ``[P, 1]`` indices. Ties at random.

        n is drawn for each prompt where it is random, and is m where it would be more.
        """
        goal, (prompts, m) = self.config.goal, source_rewards.shape
        if isinstance(goal, BestOfN):
            return random_argmax(source_rewards[:, : goal.n], generator)
        last = torch.multinomial(goal.law(m), prompts, replacement=True, generator=generator)
        out = torch.arange(m) > last.unsqueeze(-1)
        return random_argmax(source_rewards.masked_fill(out, torch.finfo(source_rewards.dtype).min), generator)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg, tilts = self.config, None
        if not cfg.pooled:
            return self._sampled(batch)
        if batch.reference_rewards is not None:
            levels = quantiles(batch.rewards, batch.reference_rewards, include_self=cfg.goal.vanishes)
            tilts = cfg.goal.log_tilt(*levels).exp(), self._log_tilt(*levels)
        return pooled.advantages(batch, self._source, cfg, tilts=tilts)

    def _log_tilt(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        """log g of levels of the reward; without the correction of p_<= alone, and for Best-of-N less log N."""
        cfg, goal = self.config, self.config.goal
        if isinstance(goal, BestOfN) and not cfg.correction:
            return goal.scale * p_le.log()
        return goal.log_tilt(p_lt if cfg.correction else p_le, p_le)

    def _sampled(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg = self.config
        targets = None
        if cfg.quantile == "learned":
            p_le = batch.classifier_logits.sigmoid().clamp(min=1e-6)
            p_lt = p_le
            # Eq. 25's label, averaged over the source samples there are: the same mean, less noise.
            _, targets = quantiles(batch.rewards, batch.source_rewards)
        else:
            pool = batch.source_rewards if batch.reference_rewards is None else batch.reference_rewards
            p_lt, p_le = quantiles(batch.rewards, pool, include_self=cfg.goal.vanishes)

        log_ratio = batch.log_ratio(self._source)
        # log pi(y) - log pi_BoN(y), whose mean is the backward KL
        backward = log_ratio - self._log_tilt(p_lt, p_le)
        metrics = {
            "bond/quantile": ((p_lt + p_le) / 2).mean().item(),
            "bond/log_quantile": p_le.clamp(min=1e-6).log().mean().item(),
            "bond/backward_kl": backward.mean().item(),
        }
        if targets is not None:
            metrics["bond/quantile_bce"] = torch.nn.functional.binary_cross_entropy(p_le, targets).item()
            metrics["bond/quantile_error"] = (p_le - targets).mean().item()
        advantages = pooled.pulled(-cfg.beta * centre(backward, cfg.baseline), batch, cfg.gamma_ref)
        found = with_selected(batch, advantages, 1.0 - cfg.beta, log_ratio, metrics)
        return replace(found, classifier_targets=targets)
