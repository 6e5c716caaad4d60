"""KDRL (arXiv 2506.02208): group-normalised rewards and the backward KL to a teacher, on the policy's own samples.

    J = J_GRPO - beta k2(pi || pi_T),    k2 = 1/2 sum_t (log pi(y_t) - log pi_T(y_t))^2

The gradient of k2 is sum_t L_t grad log pi(y_t), L_t = log pi(y_t) - log pi_T(y_t), which an advantage expresses:

    A_it = (r_i - mean r) / std r - beta m_i L_it                     ``--bond.level token``, the paper's
    A_it = (r_i - mean r) / std r - beta m_i sum_{s >= t} L_is        ``--bond.level sequence``

Where paper and proof disagree: k2 of tokens has the gradient not of KL(pi || pi_T) but, exactly, of the KL between
the next tokens' distributions, summed over the states that the policy visits, with the states held fixed. k2 of whole
responses, 1/2 (sum_t L_t)^2, has the gradient of KL(pi || pi_T); ``sequence`` is that without the terms before a
token, whose expectation is 0. Both rest at pi = pi_T where the rewards teach nothing.

beta falls linearly from ``--bond.kl_coef`` to ``--bond.kl_coef_end``. The mask m leaves out right responses
(``response``), or all of a prompt of which one is (``group``). k2 of the others rests at the teacher, but is the
gradient of no KL, as what is left out depends on the sample. At later optimiser steps L is that of the rollout, times
PPO's ratio. The teacher is ``--ref.model_name_or_path``, of the policy's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, Config, Needs, flag
from bond_plugin.bestofn.baselines import group_normalised


@dataclass(frozen=True)
class KDRLConfig(Config):
    """Settings of KDRL. The coefficients are the paper's."""

    kl_coef: float = flag(5e-3, "beta at the first step: the coefficient of the KL to the teacher", ge=0)
    kl_coef_end: float = flag(1e-3, "beta after anneal_steps", ge=0)
    anneal_steps: int = flag(100, "rollouts over which beta falls linearly; 0: it stays at kl_coef", ge=0)
    level: str = flag(
        "token",
        "'token': the KL of each next token, at the states that the policy visits (the paper's); 'sequence': "
        "KL(pi || teacher) of whole responses",
        choices=("token", "sequence"),
    )
    mask: str = flag(
        "none",
        "what is not pulled to the teacher: 'response', responses that are right; 'group', all responses to a "
        "prompt of which one is right; or 'none'",
        choices=("none", "response", "group"),
    )
    right: float = flag(1.0, "the reward from which on a response counts as right")


class KDRL(Algorithm):
    """With ``kl_coef`` 0 this is GRPO without a KL."""

    Config = KDRLConfig
    config: KDRLConfig

    def needs(self) -> Needs:
        return Needs(least=2, log_probs={"teacher"})

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        cfg = self.config
        part = min(batch.step / cfg.anneal_steps, 1.0) if cfg.anneal_steps else 0.0
        beta = cfg.kl_coef + part * (cfg.kl_coef_end - cfg.kl_coef)
        pull = batch.log_ratios("teacher")[:, : batch.n]
        if cfg.level == "sequence":
            pull = pull.flip(-1).cumsum(dim=-1).flip(-1)
        wrong = batch.rewards < cfg.right
        masks = {"none": torch.ones_like(wrong), "response": wrong, "group": wrong.all(dim=-1, keepdim=True)}
        taught = masks[cfg.mask].expand_as(wrong).double()
        return AdvantageOutputs(
            advantages=group_normalised(batch.rewards).unsqueeze(-1) - beta * taught.unsqueeze(-1) * pull,
            metrics={
                "bond/kl_teacher": batch.log_ratio("teacher").mean().item(),
                "bond/kl_coef": beta,
                "bond/taught": taught.mean().item(),
            },
        )
