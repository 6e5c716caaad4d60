"""Run in each rank of a real DeepSpeed job: an anchor beside bf16 training, against float64.

usage: anchor.py OUT.json ZERO_STAGE:STEPS ...
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from device import BACKEND, DEVICE

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from transformers import LlamaConfig, LlamaForCausalLM

from bond_plugin.host.checkpoints import anchor_file, load_ckpt, save_ckpt
from bond_plugin.host.weights import CheckpointError, Weights

ETA, LR = 0.02, 3e-6
deepspeed.init_distributed(BACKEND)


class Late:
    """An all-gather that begins when it is waited for: as late as a backend without NCCL's order may be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._call = args, kwargs

    def wait(self) -> None:
        args, kwargs = self._call
        GATHER(*args, **kwargs)


GATHER = deepspeed.comm.all_gather_into_tensor


def gather_late(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    return Late(*args, **kwargs) if async_op and BACKEND == "gloo" else GATHER(*args, async_op=async_op, **kwargs)


def measure(stage: int, steps: int) -> dict:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ranks = dist.get_world_size()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True, "weight_decay": 0.0}},
            "steps_per_print": 10**9,
        },
    )
    weights = Weights(engine, ETA, keep_reference=True)
    params = dict(engine.module.named_parameters())

    def full() -> dict:
        """The 16-bit parameters as they are now, whole, on every rank."""
        found = {}
        for name, p in params.items():
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                found[name] = p.detach().clone()
        return found

    def masters() -> dict:
        return {name: safe_get_full_fp32_param(p).detach().double().clone() for name, p in params.items()}

    start = masters()
    exact = {name: value.clone() for name, value in start.items()}
    naive = {name: value.to(torch.bfloat16) for name, value in start.items()}  # as the host averages
    data = torch.Generator().manual_seed(1 + dist.get_rank())
    batches = [torch.randint(0, 32, (2, 16), generator=data).to(DEVICE) for _ in range(8)]  # to be learned by heart
    for step in range(steps):
        for half in range(2):
            ids = batches[(2 * step + half) % len(batches)]
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            weights.after_optimizer_step()
        now = masters()
        low = full()
        for name in exact:
            exact[name] = (1 - ETA) * exact[name] + ETA * now[name]
            naive[name].copy_(ETA * low[name] + (1 - ETA) * naive[name])

    before = full()
    with weights.swapped_in("anchor"):
        anchor16 = full()
        assert weights.active == "anchor"
        try:
            with weights.swapped_in("reference"):
                nested = "allowed"
        except RuntimeError:
            nested = "refused"
    between = full()
    deepspeed.comm.all_gather_into_tensor = gather_late
    with weights.swapped_in("reference"):
        deepspeed.comm.all_gather_into_tensor = GATHER
        reference16 = full()
        deepspeed.comm.all_gather_into_tensor = gather_late
    deepspeed.comm.all_gather_into_tensor = GATHER
    restored = full()

    moved = sum(((exact[n] - start[n]) ** 2).sum() for n in exact).sqrt()
    # The fp32 average, whole: put it in the masters' place for a moment, which DeepSpeed can gather.
    held = [m.detach().clone() for m in weights._sharded.masters()]
    for master, part in zip(weights._sharded.masters(), weights._sets["anchor"], strict=True):
        master.data.copy_(part)
    kept = masters()
    for master, part in zip(weights._sharded.masters(), held, strict=True):
        master.data.copy_(part)
    distance = weights.anchor_distance()
    numbers = {
        "ranks": ranks,
        "displacement": moved.item(),
        "error": (sum(((kept[n] - exact[n]) ** 2).sum() for n in exact).sqrt() / moved).item(),
        "naive_error": (sum(((naive[n].double() - exact[n]) ** 2).sum() for n in exact).sqrt() / moved).item(),
        "bytes_per_rank": sum(p.numel() * p.element_size() for p in weights._sets["anchor"]),
        "parameters": sum(v.numel() for v in start.values()),
        "anchor_is_rounded_average": all(torch.equal(anchor16[n], kept[n].to(torch.bfloat16)) for n in exact),
        "anchor_differs_from_policy": any(not torch.equal(anchor16[n], before[n]) for n in exact),
        "reference_is_initial": all(torch.equal(reference16[n], start[n].to(torch.bfloat16)) for n in exact),
        "restored_exactly": all(
            torch.equal(before[n], between[n]) and torch.equal(before[n], restored[n]) for n in exact
        ),
        "nested": nested,
        "distance": distance,
        "distance_exact": sum(((now[n] - exact[n]) ** 2).sum() for n in exact).sqrt().item(),
    }
    # Training goes on from the restored weights: one more step must work and move the masters.
    ids = batches[0]
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    after = masters()
    numbers["trains_on"] = any(not torch.equal(after[n], now[n]) for n in after)

    # A checkpoint, through what is attached to the host's strategy around DeepSpeed's own saving and loading.
    engine.bond_weights = weights
    strategy = SimpleNamespace(
        args=SimpleNamespace(ds=SimpleNamespace(use_universal_ckpt=False)),
        is_rank_0=lambda: dist.get_rank() == 0,
        print=print,
        _write_ckpt_metric=lambda *_, **__: None,
        _read_ckpt_metric=lambda _: None,
    )
    folder = f"{sys.argv[1]}.{stage}"

    def load(_: object, model: Any, load_dir: str, tag: str) -> tuple:
        return model.load_checkpoint(load_dir, tag)

    save_ckpt(None, strategy, engine, folder, "step1")
    saved = [part.clone() for part in weights._sets["anchor"]]
    for part in weights._sets["anchor"]:
        part.zero_()
    load_ckpt(load, strategy, engine, folder)
    numbers["loaded"] = all(torch.equal(a, b) for a, b in zip(saved, weights._sets["anchor"], strict=True))
    dist.barrier()  # each rank reads the files of all
    os.unlink(anchor_file(Path(folder, "step1"), dist.get_rank()))
    try:
        load_ckpt(load, strategy, engine, folder)
        numbers["without_anchor"] = "loaded"
    except CheckpointError as error:
        numbers["without_anchor"] = str(error)

    # A periodic copy instead of an average: equal to the masters after every third step, and only then.
    periodic = Weights(engine, None, keep_reference=False, interval=3)
    periodic._steps_seen = 0  # counted from the engine's steps: begin at a multiple of three
    engine.global_steps = 0
    numbers["copies"] = []
    for step in range(4):
        for half in range(2):
            ids = batches[(2 * step + half) % len(batches)]
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            periodic.after_optimizer_step()
        numbers["copies"].append(periodic.anchor_distance() == 0.0)
    return numbers


found = {run: measure(*map(int, run.split(":"))) for run in sys.argv[2:]}
if dist.get_rank() == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.barrier()
