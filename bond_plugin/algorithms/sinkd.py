"""Distillation of a teacher's logits: Sinkhorn distance, forward and backward KL, Jensen-Shannon divergence.

"Sinkhorn Distance Minimization for Knowledge Distillation", arXiv 2402.17110. At K response tokens of the policy's
samples the policy has the distributions s_1 ... s_K over the vocabulary and the teacher t_1 ... t_K (softmax of the
logits at a temperature tau). The loss of token i is the weighted sum of

    sinkhorn         sum_j P_ij C_ij,  C_ij = |s_i - t_j|_1,  P = Sinkhorn(exp(-C / lambda)), T iterations
    forward_kl       KL(t_i || s_i)
    backward_kl      KL(s_i || t_i)
    jensen_shannon   JS(s_i, t_i), in [0, log 2]

and that of a response the sum over its tokens. P has rows and columns that sum to 1 (the teacher's tokens are matched
as a set, "batch-wise"); gradients go through the iterations. Which states the policy visits has none (as in arXiv
2306.13649); rewards are reported and not used.

Alone the Sinkhorn distance has not the teacher for its optimum: sets can lie near each other in another order, and
lambda blurs them. The others have, and so has the default, its sum with the forward KL (the paper adds
cross-entropy).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, Config, Needs, flag
from bond_plugin.algorithms.logits import Logits
from bond_plugin.bestofn.divergences import jensen_shannon, kl, transport


@dataclass(frozen=True)
class SinKDConfig(Config):
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
            costs = [part.distances() for part in logits.split(cfg.block)]
            paid = [(transport(each, cfg.blur, cfg.iterations) * each).sum(dim=-1) for each in costs]
            found = found + cfg.sinkhorn * torch.cat(paid)
        return found

    def _divergences(self, policy: Tensor, teacher: Tensor) -> Tensor:
        found = self.config.jensen_shannon * jensen_shannon(policy, teacher)
        return found + self.config.forward_kl * kl(teacher, policy) + self.config.backward_kl * kl(policy, teacher)
