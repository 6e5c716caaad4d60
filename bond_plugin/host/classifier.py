"""The learned quantile: a sequence classifier p_<=(x, y) in the host's critic slot.

The host makes, shards, optimises and checkpoints a critic: a language model with a scalar head on each token.
Here the head's value at a response's last token is a logit, trained by binary cross-entropy (Eq. 25 of arXiv
2407.14622) instead of on returns. The host's critic never looks at the last token, because the value of a state
does not depend on the action taken in it; the classifier does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bond_plugin.host import loss, plan
from bond_plugin.host.state import ROWS


def logits_of(critic: Any, sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """The prepared critic's logit at the last token of each row of ``[B, T]``: ``[B]`` float32."""
    # The model gives values for all tokens but the last one: append one that nothing attends to.
    padded = torch.nn.functional.pad(sequences, (0, 1))
    attention = torch.nn.functional.pad(attention_mask, (0, 1))
    values = critic(padded, action_mask=torch.ones_like(sequences), attention_mask=attention)
    last = sequences.shape[1] - 1 - attention_mask.long().flip(-1).argmax(dim=-1, keepdim=True)
    return values.gather(-1, last).squeeze(-1).float()


def training_step(original: Any, self: Any, experience: Any, step: int, loss_batch_info: Any = None) -> dict:
    """One micro-batch of the critic's training: of the classifier's, where there is one."""
    loss.mark(self, self.critic, step)
    if not plan.of(self.args).needs.classifier:
        return original(self, experience, step, loss_batch_info)
    args = self.args
    device = experience.sequences.device
    targets = [row.classifier_target for row in experience.info[ROWS]]
    trained = torch.tensor([target is not None for target in targets], device=device)
    target = torch.tensor([target or 0.0 for target in targets], device=device)
    self.critic.train()
    logits = logits_of(self.critic, experience.sequences, experience.attention_mask)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # DeepSpeed averages over ranks and micro-batches: a row's share is of all policy samples of the step.
    scale = torch.distributed.get_world_size() * loss.divisor(self.strategy) / args.train.batch_size
    total = torch.where(trained, losses, 0.0).sum() * scale
    self.strategy.backward(total, self.critic, self.critic_optim)
    if loss.ends_step(self, step):
        self.strategy.optimizer_step(self.critic_optim, self.critic, self.critic_scheduler, name="critic")
    return {
        "bond/classifier_loss": total.item(),
        "critic_lr": self.critic_scheduler.get_last_lr()[0],
        "critic_grad_norm": self.strategy.get_grad_norm(self.critic),
    }


@torch.no_grad()
def logits(worker: Any, all_data: dict[str, list[Tensor]], start: int, end: int) -> list[Tensor]:
    """What a critic's worker answers where the host asks for values: the logits of its share of a rollout.

    Of ``sequences`` and ``attention_mask``, lists of ``[B, T]``; each ``[B]`` float32, on the CPU.
    """
    device = torch.cuda.current_device()
    share = zip(all_data["sequences"][start:end], all_data["attention_mask"][start:end], strict=True)
    worker.critic.eval()
    found = [logits_of(worker.critic, s.to(device), a.to(device)).cpu() for s, a in share]
    worker.critic.train()
    return found
