"""DPH-RL: GRPO without a KL where there is something to learn, a divergence to the reference where there is not.

Before training, M responses a prompt are drawn from the initial policy (``bond cache --cache.log_probs``). Prompts
of which all are right (``--bond.solved``) are D_pef, the others D_exp (arXiv 2509.07430). With u = pi / pi_ref of
stored responses,

    on D_exp    PPO's clipped loss, A_i = (r_i - mean r) / std r, no KL
    on D_pef    eta f(u),   f(u) = -log u                                        forward KL
                            f(u) = 1/2 (u log u - (u + 1) log((u + 1) / 2))      Jensen-Shannon

u needs the stored log-probabilities alone: no reference model runs (leave ``--bond.kl_ref`` off too). f is made
anew at each optimiser step, and stored responses are the reference's whatever the policy has become, so eta
E_ref[f(u)] and its gradient are exact at every one.

Where paper and proof disagree. (1) D_f(pi || pi_ref) = E_ref[f(u)] holds for u of whole responses (``--bond.level
sequence``). The authors' code takes u of each token. That is the divergence of the next tokens' distributions,
summed over the states that the reference visits: for the forward KL the same number, for Jensen-Shannon another. Of
long responses u is all but 0 or huge, where Jensen-Shannon of sequences has no gradient: take ``token`` there. (2)
Responses to a prompt that is in D_pef because all of them are right are samples of pi_ref(. | right): the forward
KL is to that, up to a constant, and imitates what the reference has right. Of Jensen-Shannon it is the part of
right responses.

The loss is the mean over all prompts of a step, so D_pef counts by its share of the prompts. The policy's samples
are drawn on D_pef too, where they have no advantage, and stored responses enter with weight 0 on D_exp. That costs
the share of D_pef in generation, and ``--bond.n_stored`` in n of training on D_exp; ``bond/kept`` is made of the
former.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag, reward_cache_flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs
from bond_plugin.algorithms.jbond import policy_loss
from bond_plugin.bestofn.baselines import group_normalised


@dataclass(frozen=True)
class DPHConfig(Config):
    """Settings of DPH-RL."""

    divergence: str = flag("forward_kl", "what holds the policy on D_pef", choices=("forward_kl", "jensen_shannon"))
    eta: float = flag(0.05, "weight of the divergence; the authors: 0.01 to 0.05 forward, 0.05 to 0.2 for JS", ge=0)
    level: str = flag(
        "sequence",
        "u = pi / pi_ref of whole responses ('sequence') or of each token ('token', as the authors'); the same for "
        "the forward KL",
        choices=("sequence", "token"),
    )
    solved: float = flag(1.0, "a prompt is in D_pef if this share of its stored responses is right", gt=0, le=1)
    right: float = flag(1.0, "the reward from which on a response counts as right")
    n_stored: int = flag(1, "stored responses a prompt and step, at most as many as the cache has", ge=1)
    reward_cache: str = reward_cache_flag("the file of stored responses, made by `bond cache --cache.log_probs`")


class DPH(Algorithm):
    """The policy's samples teach on D_exp, stored ones hold it on D_pef."""

    Config = DPHConfig
    policy_loss = "own"
    config: DPHConfig

    def needs(self) -> Needs:
        f = self.config.n_stored
        return Needs(source="stored", source_samples=f, selected_samples=f, reward_cache=True, least=2)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """0 on D_pef; and eta for stored responses on D_pef, which the loss finds in the advantages' place."""
        cfg = self.config
        held = (batch.reference_rewards >= cfg.right).double().mean(dim=-1) >= cfg.solved - 1e-9
        metrics = {"bond/held": held.double().mean().item()}
        if held.any():
            metrics["bond/divergence"] = self.divergence(batch.log_ratios("behaviour")[held, batch.n :]).mean().item()
            metrics["bond/kept"] = (batch.rewards[held] >= cfg.right).double().mean().item()
        return AdvantageOutputs(
            advantages=torch.where(held.unsqueeze(-1), 0.0, group_normalised(batch.rewards)),
            selected_advantages=cfg.eta * held.double().unsqueeze(-1).expand(batch.source_rewards.shape),
            metrics=metrics,
        )

    def divergence(self, log_ratios: Tensor) -> Tensor:
        """f(u) of responses, ``[..., A]`` log u of their tokens (0 beyond the end) to ``[...]``, in nats."""
        if self.config.divergence == "forward_kl":
            return -log_ratios.sum(dim=-1)
        if self.config.level == "sequence":
            log_ratios = log_ratios.sum(dim=-1, keepdim=True)
        log_ratios = log_ratios.clamp(max=20)  # beyond, u overflows
        u = log_ratios.exp()
        return ((u + 1) * math.log(2) - u * softplus(-log_ratios) - softplus(log_ratios)).sum(dim=-1) / 2

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """PPO's on the policy's samples, eta f(u) on stored ones."""
        found, mask = policy_loss(inputs), inputs.mask.bool()
        stored = mask & inputs.from_source.unsqueeze(-1)
        log_ratios = torch.where(stored, inputs.log_probs - inputs.under["behaviour"], 0.0)
        weight = torch.where(mask, inputs.advantages, 0.0).sum(dim=-1) / mask.sum(dim=-1)
        row_loss = torch.where(inputs.from_source, weight * self.divergence(log_ratios), found.row_loss)
        return replace(found, row_loss=row_loss)
