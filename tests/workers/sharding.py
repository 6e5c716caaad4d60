"""Run in each rank of a real DeepSpeed job: the gradient of one optimiser step, for several ways to split the batch.

usage: sharding.py OUT.pt ZERO_STAGE:MICRO_BATCH_SIZE ...
"""

import os
import sys
from types import SimpleNamespace

os.environ["BOND_DEVICE"] = "cpu"
from bond_plugin.host import cpu, hooks

os.environ.update(cpu.ENVIRONMENT)
hooks.arm()

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import LlamaConfig, LlamaForCausalLM

from bond_plugin.algorithms.jbond import policy_loss
from bond_plugin.host.loss import PromptMeanLoss

PROMPTS = 8  # one row of the policy and one of the source each
deepspeed.init_distributed("gloo")
ranks, rank = dist.get_world_size(), dist.get_rank()
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


data = torch.Generator().manual_seed(1)
rows = 2 * PROMPTS
ids = torch.randint(0, 32, (rows, 12), generator=data)
lengths = torch.randint(1, 12, (rows,), generator=data)
lengths[3] = 0  # an empty response
mask = (torch.arange(11) < lengths.unsqueeze(1)).float()
from_source = torch.arange(rows) % 2 == 1
advantages = torch.randn(rows, 1, generator=data) * mask


def gradient(stage: int, micro: int) -> dict:
    policy = model()
    accumulation = 2 * PROMPTS // (micro * ranks)
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=policy.parameters(),
        config={
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": 10**9,
        },
    )
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="jbond")),
        bond=SimpleNamespace(),
        rollout=SimpleNamespace(n_samples_per_prompt=1, batch_size=PROMPTS),
        train=SimpleNamespace(batch_size=PROMPTS, max_epochs=1),
        actor=SimpleNamespace(eps_clip_low_high=(0.2, 0.2)),
    )
    loss_fn = PromptMeanLoss(policy_loss, args, accumulation)

    share = rows // ranks
    for start in range(rank * share, (rank + 1) * share, micro):
        part = slice(start, start + micro)
        logits = engine(input_ids=ids[part]).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1).gather(-1, ids[part, 1:].unsqueeze(-1)).squeeze(-1)
        loss_fn.known = {"from_source": from_source[part]}
        loss, *_ = loss_fn(log_probs, log_probs.detach(), advantages[part], mask[part], dp_size=ranks)
        engine.backward(loss)
        if start + micro < (rank + 1) * share:
            engine.step()  # accumulates
    return {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}


found = {split: gradient(*map(int, split.split(":"))) for split in sys.argv[2:]}
if rank == 0:
    # The mean over prompts of what the definition says, by plain autograd.
    plain = model()
    logits = plain(input_ids=ids).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    (-(log_probs * advantages * mask).sum() / PROMPTS).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    torch.save({"found": found, "wanted": wanted}, sys.argv[1])
dist.barrier()
