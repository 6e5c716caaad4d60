"""Distillation of a teacher's logits: Sinkhorn distance, forward and backward KL, Jensen-Shannon divergence.

"Sinkhorn Distance Minimization for Knowledge Distillation", arXiv 2402.17110. At K response tokens of the policy's
samples the policy has the distributions s_1 ... s_K over the vocabulary and the teacher t_1 ... t_K (softmax of the
logits at a temperature tau). The loss of token i is the weighted sum of

    sinkhorn         sum_j P_ij C_ij,  C_ij = |s_i - t_j|_1,  P = Sinkhorn(exp(-C / lambda)), T iterations
    forward_kl       KL(t_i || s_i)
    backward_kl      KL(s_i || t_i)
    jensen_shannon   JS(s_i, t_i), in [0, log 2]

and that of a response the sum over its tokens. P has rows and columns that sum to 1 (the paper's "batch-wise"
transport: the teacher's tokens are matched as a set). Gradients go through the iterations. The samples are taken as
given: which states the policy visits has no gradient (as in arXiv 2306.13649); rewards are reported and not used.

The Sinkhorn distance alone has not the teacher for its optimum: a set of distributions can lie near another one in
another order, and lambda blurs them. In the laboratory it moves away from the teacher; each of the others reaches it,
and so does the default, the sum with the forward KL. (The paper distils on its task's data, with lambda = 0.1 and
T = 20, and adds KL and cross-entropy.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs
from bond_plugin.algorithms.logits import Logits


@dataclass(frozen=True)
class SinKDConfig(Config):
    """Settings of distillation on logits."""

    sinkhorn: float = flag(1.0, "weight of the Sinkhorn distance to the teacher's tokens", ge=0)
    forward_kl: float = flag(1.0, "weight of KL(teacher || policy) at each token", ge=0)
    backward_kl: float = flag(0.0, "weight of KL(policy || teacher) at each token", ge=0)
    jensen_shannon: float = flag(0.0, "weight of their Jensen-Shannon divergence at each token", ge=0)
    blur: float = flag(0.1, "lambda of the Sinkhorn distance: the smaller, the nearer to the transport itself", gt=0)
    iterations: int = flag(20, "T, iterations of the Sinkhorn distance", ge=1)
    block: int = flag(256, "tokens that are matched with one another; memory grows with its square", ge=2)
    softness: float = flag(1.0, "tau: what logits are divided by, beside the sampling temperature", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((self.sinkhorn, self.forward_kl, self.backward_kl, self.jensen_shannon)):
            raise ValueError("one of --bond.sinkhorn, forward_kl, backward_kl and jensen_shannon must be above 0")


class SinKD(Algorithm):
    """Needs a teacher, ``--ref.model_name_or_path``, of any size, with the policy's vocabulary."""

    Config = SinKDConfig
    policy_loss = "own"
    config: SinKDConfig

    def needs(self) -> Needs:
        return Needs(log_probs={"teacher"}, logits=True)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        metrics = {"bond/kl_teacher": batch.log_ratio("teacher").mean().item()}
        return AdvantageOutputs(torch.zeros_like(batch.rewards), metrics=metrics)

    def token_losses(self, logits: Logits) -> Tensor:
        cfg = self.config
        logits = replace(logits, temperature=logits.temperature * cfg.softness)
        found = torch.zeros(logits.tokens, device=logits.policy.hidden.device)
        if cfg.forward_kl or cfg.backward_kl or cfg.jensen_shannon:
            found = found + logits.over_tokens(self._divergences)
        if cfg.sinkhorn:
            costs = [cost(part) for part in logits.split(cfg.block)]
            paid = [(transport(each, cfg.blur, cfg.iterations) * each).sum(dim=-1) for each in costs]
            found = found + cfg.sinkhorn * torch.cat(paid)
        return found

    def _divergences(self, policy: Tensor, teacher: Tensor) -> Tensor:
        middle = torch.logaddexp(policy, teacher) - math.log(2)
        found = self.config.jensen_shannon * (kl(policy, middle) + kl(teacher, middle)) / 2
        return found + self.config.forward_kl * kl(teacher, policy) + self.config.backward_kl * kl(policy, teacher)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(inputs.token_losses.sum(dim=-1))


def kl(first: Tensor, second: Tensor) -> Tensor:
    """``[k]``: KL(first || second) of log-probabilities ``[k, V]``, nats."""
    return (first.exp() * (first - second)).sum(dim=-1)


def cost(logits: Logits) -> Tensor:
    """``[K, K]``: the L1 distance of each token of the policy to each of the teacher, in [0, 2]."""
    return logits.over_words(lambda own, other: torch.cdist(own.exp(), other.exp(), p=1), held=logits.tokens)


def transport(cost: Tensor, blur: float, iterations: int) -> Tensor:
    """``[K, K]``: the plan, exp(-cost / blur) with columns and rows scaled to sum to 1 in turn, in log space."""
    log_plan = -cost / blur
    for dim in (0, 1) * iterations:
        log_plan = log_plan - log_plan.logsumexp(dim=dim, keepdim=True)
    return log_plan.exp()
