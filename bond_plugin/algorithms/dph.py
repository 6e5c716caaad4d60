"""DPH-RL (arXiv 2509.07430): GRPO where there is something to learn, elsewhere a divergence to the reference.

Prompts of whose stored responses (``bond cache --cache.log_probs``) all are right (``--bond.solved``) are D_pef, the
others D_exp. With u = pi / pi_ref of stored responses,

    on D_exp    PPO's clipped loss, A_i = (r_i - mean r) / std r, no KL
    on D_pef    eta f(u),   f(u) = -log u                                        forward KL
                            f(u) = 1/2 (u log u - (u + 1) log((u + 1) / 2))      Jensen-Shannon

f is made anew at each optimiser step; stored responses stay pi_ref's whatever the policy has become, so E_ref[f(u)]
is exact, without a reference model. It is D_f(pi || pi_ref) for u of whole responses (``--bond.level sequence``). The
authors' u of each token has the next tokens' divergences at the reference's states: of the forward KL the same, of
Jensen-Shannon another, which has a gradient where responses are long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.algorithms.base import Algorithm, Config, Needs, flag, reward_cache_flag
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs
from bond_plugin.algorithms.jbond import policy_loss
from bond_plugin.bestofn.baselines import group_normalised
from bond_plugin.bestofn.divergences import GENERATORS


@dataclass(frozen=True)
class DPHConfig(Config):
    divergence: str = flag("forward_kl", "what holds the policy on D_pef", choices=tuple(GENERATORS))
    eta: float = flag(0.05, "weight of the divergence; the authors: 0.01 to 0.05 forward, 0.05 to 0.2 for JS", ge=0)
    level: str = flag(
        "sequence",
        "u = pi / pi_ref of whole responses, or of each token, as the authors'; the same for the forward KL",
        choices=("sequence", "token"),
    )
    solved: float = flag(1.0, "a prompt is in D_pef if this share of its stored responses is right", gt=0, le=1)
    right: float = flag(1.0, "the reward from which on a response counts as right")
    n_stored: int = flag(1, "stored responses a prompt and step, at most as many as the cache has", ge=1)
    reward_cache: str = reward_cache_flag("the file of stored responses, made by `bond cache --cache.log_probs`")


class DPH(Algorithm):
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
        if self.config.level == "sequence":
            log_ratios = log_ratios.sum(dim=-1, keepdim=True)
        return GENERATORS[self.config.divergence](log_ratios).sum(dim=-1)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """PPO's on the policy's samples, eta f(u) on stored ones."""
        divergence = self.divergence(inputs.within(inputs.log_probs - inputs.under["behaviour"]))
        weight = inputs.within(inputs.advantages).sum(dim=-1) / inputs.mask.sum(dim=-1)
        found = policy_loss(inputs)
        return replace(found, row_loss=torch.where(inputs.from_source, weight * divergence, found.row_loss))
