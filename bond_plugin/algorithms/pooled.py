"""The pooled form of Best-of-N distillation: every sample is compared with every other. Ours, not the papers'.

BOND and J-BOND (arXiv 2407.14622) draw samples of the anchor to learn from. The same target can be had from the
policy's own samples and log pi_anchor of them. Of S samples y_1 ... y_S of a prompt, n from the policy and m from the
anchor (m = 0 is the usual case), each has the weights

    a_i = pi_anchor(y_i) / q(y_i),   p_i = pi(y_i) / q(y_i),   q = (n pi + m pi_anchor) / S

(the balance heuristic, Veach & Guibas 1995; with m = 0: p_i = 1, a_i = pi_anchor / pi). With ĝ an estimate of
g = pi_BoN / pi_anchor and log ĝ one of its logarithm from the other samples (see :mod:`bond_plugin.bestofn.pooled`),
token t of y_i is trained with the advantage

    A_it = (1 - beta) (a_i ĝ_i - p_i)                              forward KL; E[p grad log pi] = 0 is its baseline
         + beta p_i (log ĝ_i - B - (L_it - mean of others))        backward KL
         - gamma p_i (L_it - mean of others)                       KL(pi || pi_anchor), Eq. 19
         - gamma_ref p_i (L'_it - mean of others)                  KL(pi || pi_ref)

where L_it = sum_{s >= t} log pi(y_is) - log pi_anchor(y_is) is a reward-to-go: what came before a token does not
depend on it. L' is the same with the initial policy. The mean over the prompt's other samples, at the same token,
does not depend on y_i. For log ĝ that would be wrong: ranks within a prompt depend on one another, and that
would multiply the rank part by S / (S - 1) against the KL. B is the mean over other prompts; with one prompt it is
what the mean is where the policy is the anchor, -(N - 1) k / (k + 1) with k = S - 1. ``--bond.target`` has other g,
with estimators of the same kind: see :mod:`bond_plugin.bestofn.targets`.

So that no sample makes up the whole gradient of a step, a is cut off at ``--bond.max_weight`` (truncated importance
sampling, Ionides 2008), which puts min(pi_anchor, c q) in the anchor's place: everything above is exact for that.
``bond/truncated`` is the share delta of the anchor's mass that it leaves out; a sample's F is too large by at most
delta, and the forward term learns less of what the policy has all but forgotten.

Samples of an earlier policy mu (asynchronous training): the weights of the *others* are relative to mu; the sample's
own pi / mu is left to the host's importance-sampling correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bond_plugin.algorithms.base import Config, Source, Targeted, flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs
from bond_plugin.bestofn import pooled as estimates
from bond_plugin.bestofn.baselines import BASELINES, leave_one_out_mean
from bond_plugin.bestofn.targets import BestOfN, Target


def max_weight_flag(weights: str, whole: str) -> Any:
    """The field ``max_weight`` of those that weigh samples."""
    said = "above this are cut off, so that no sample makes up a whole step; bond/truncated is the share of"
    return flag(10.0, f"{weights} {said} {whole} that this leaves out; inf: never", ge=1, le=math.inf)


def ess_metrics(weights: Tensor) -> dict[str, float]:
    """The share of effective samples, mean and least of all prompts, of weights ``[P, S]``."""
    ess = estimates.effective_sample_size(weights)
    return {"bond/ess": ess.mean().item(), "bond/ess_min": ess.amin().item()}


@dataclass(frozen=True)
class PooledConfig(Targeted, Config):
    """Settings that BOND and J-BOND share, as both can take the pooled form; the defaults are those of J-BOND."""

    beta: float = flag(
        0.5, "weight of the backward KL in the Jeffreys divergence; the forward KL has 1 - beta", ge=0, le=1
    )
    eta: float = flag(
        0.02, "step of the anchor's moving average, anchor <- (1 - eta) anchor + eta policy", ge=0, le=1
    )
    gamma_ref: float = flag(
        0.0,
        "coefficient of KL(pi || initial policy): takes back what noise costs in KL, which a moving anchor never "
        "does; 0.1 to 0.3 did well. Ours, not the paper's",
        ge=0,
    )
    n_anchor_samples: int = flag(
        0,
        "m: samples of the anchor per prompt. 0: none, the policy's own samples are weighted (pooled form). 2 or "
        "more: Algorithm 2 as printed, whose target is Best-of-m; the paper's is 2",
    )
    max_weight: float = max_weight_flag("pooled form: weights pi_anchor/pi", "the anchor")
    normalised: bool = flag(
        False,
        "pooled form: divide by the weights of the other samples instead of by their number. Less noise, but its "
        "target lies beyond Best-of-N, the further the smaller bond/ess is and the fewer samples a prompt has",
    )
    min_ess: float = flag(
        0.2,
        "pooled form: say so once when bond/ess, the share of effective samples, falls below this",
        ge=0,
        le=1,
    )
    baseline: str = flag(
        "batch",
        "baseline B of the backward term: 'batch', the mean return of the other samples in the rollout batch; "
        "'leave_one_out', of the prompt's other samples (not in the pooled form, where it would change the target); "
        "or 'none'",
        choices=BASELINES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.goal
        if self.pooled and self.baseline == "leave_one_out":
            raise ValueError(
                "--bond.baseline leave_one_out would change the pooled form's target (ranks within a prompt depend "
                "on one another): use batch, where the log-ratio has the prompt's other samples for its baseline "
                "anyway"
            )

    @property
    def pooled(self) -> bool:
        """Whether this is the pooled form."""
        return self.n_anchor_samples == 0


def advantages(
    batch: AdvantageInputs,
    anchor: Source,
    config: PooledConfig,
    gamma: float = 0.0,
    tilts: tuple[Tensor, Tensor] | None = None,
) -> AdvantageOutputs:
    """The advantages A_it of the head of this file. All samples of the anchor are selected, in their order.

    Args:
        anchor: the name of its weights.
        gamma: see above.
        tilts: ĝ, and log ĝ up to a constant, ``[P, S]`` each; from the other samples by default.
    """
    n, goal, beta, centred = batch.n, config.goal, config.beta, config.baseline != "none"
    rewards = torch.cat([batch.rewards, batch.source_rewards], dim=-1)
    log_ratios = batch.log_ratios(anchor)
    log_ratio = log_ratios.sum(dim=-1)
    moved = torch.zeros_like(log_ratio)  # log pi - log mu
    if "behaviour" in batch.under:
        moved[:, :n] = batch.log_ratio("behaviour")
    among, _ = estimates.mixture_weights(moved, moved - log_ratio, n)
    weights = among.clamp(max=config.max_weight)
    # a and p as a sample's own coefficients, mu left out.
    own_anchor, own = estimates.mixture_weights(torch.zeros_like(moved), -log_ratio, n)
    own_anchor = own_anchor.clamp(max=config.max_weight)
    tilt, log_tilt = tilts or goal.pooled(rewards, weights, config.normalised)

    def parts(log_ratios: Tensor) -> Tensor:
        return _to_go(log_ratios, own, centred).mul_(own.unsqueeze(-1))

    baseline = _other_prompts(log_tilt, own, goal) if centred else 0.0
    forward, backward = (1 - beta) * (own_anchor * tilt - own), beta * own * (log_tilt - baseline)
    found = parts(log_ratios).mul_(-(beta + gamma)).add_((forward + backward).unsqueeze(-1))
    if config.gamma_ref:
        found -= parts(batch.log_ratios("reference")).mul_(config.gamma_ref)

    pairs = estimates.pooled_tilt(rewards, weights, 2, normalised=True)[:, :n] / 2
    log_quantile = estimates.harmonic_log_quantile(rewards, weights, config.normalised)
    cut = (among - weights).sum() / among.sum().clamp(min=1e-300)
    metrics = {
        "bond/win_rate": pairs.mean().item(),
        "bond/log_quantile": log_quantile[:, :n].mean().item(),
        "bond/kl_anchor": log_ratio[:, :n].mean().item(),
        "bond/forward_nll": -(own_anchor * tilt * batch.log_probs).mean().item(),
        **ess_metrics(weights),
        "bond/truncated": cut.item(),
    }
    # The host's mean over a prompt's rows is one over n of the policy's plus one over m of the anchor's.
    size = rewards.shape[-1]
    return AdvantageOutputs(
        advantages=found[:, :n] * (n / size),
        selected_advantages=found[:, n:] * ((size - n) / size) if size > n else None,
        metrics=metrics,
    )


def _other_prompts(values: Tensor, weights: Tensor, goal: Target) -> Tensor | float:
    """``[P, 1]``: the weighted mean of ``[P, S]`` values over the samples of all other prompts."""
    if len(values) > 1:
        return leave_one_out_mean((values * weights).mean(dim=-1)).unsqueeze(-1)
    size = values.shape[-1]
    if isinstance(goal, BestOfN):
        return -goal.scale * (size - 1) / size
    ranks = torch.arange(1, 2 * size, 2, dtype=values.dtype) / (2 * size)
    return (goal.log_tilt(ranks, ranks).mean() - goal.log_tilt(ranks.new_ones(1), ranks.new_ones(1))).item()


def _to_go(log_ratios: Tensor, weights: Tensor, centred: bool) -> Tensor:
    """``[P, S, A]``: the sum from each token on, less the weighted mean of the prompt's other samples' there."""
    to_go = log_ratios.flip(-1).cumsum_(dim=-1).flip(-1)
    if not centred or to_go.shape[1] < 2:
        return to_go
    weighted = weights.unsqueeze(-1) * to_go  # in place from here: a rollout's tokens in float64 are large
    total = weights.sum(dim=1, keepdim=True)
    rest = (total - weights).clamp(min=1e-300).unsqueeze(-1)
    together = weighted.sum(dim=1, keepdim=True)
    return to_go.sub_(weighted.neg_().add_(together).div_(rest))


@dataclass(frozen=True)
class PulledConfig(Config):
    """Of an algorithm with no divergence of its own that can be held near the initial policy by :func:`pulled`."""

    gamma_ref: float = flag(0.0, "coefficient of KL(pi || initial policy); 0 needs no log-probabilities of it", ge=0)

    @property
    def log_probs(self) -> set[str]:
        """What :attr:`Needs.log_probs` is for the pull."""
        return {"reference"} if self.gamma_ref else set()


def pulled(advantages: Tensor, batch: AdvantageInputs, gamma_ref: float) -> Tensor:
    """``[P, n]`` advantages with the pull to the initial policy, ``[P, n, A]``; as they are for ``gamma_ref`` 0."""
    if not gamma_ref:
        return advantages
    to_reference = batch.log_ratios("reference")[:, : batch.n]
    pull = _to_go(to_reference, torch.ones_like(advantages), centred=True)
    return advantages.unsqueeze(-1) - gamma_ref * pull


def least(config: PooledConfig, m: int) -> int:
    """How many samples of the policy the pooled form takes with ``m`` samples of the anchor.

    The forward term of Best-of-Poisson and the exponential tilt is that of the best of min(n, S) samples, n being
    random, so it wants an S that n is hardly ever above. Their backward terms take any.
    """
    goal = config.goal
    size = 2 if config.beta == 1 and not isinstance(goal, BestOfN) else goal.samples
    return max(size - m, 1 if m else 2)
