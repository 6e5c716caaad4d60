"""Run in each rank of a real DeepSpeed job: checkpoints that some ranks write at one ZeRO stage, and others read.

usage: resume.py FLAGS.json OUT.pt FOLDER WHAT ...

WHAT is save:KIND:STAGE, which trains a policy and writes FOLDER/RANKS-KIND-STAGE; anchor:KIND:STAGE:NAME, which takes
the anchor alone of what is saved under that name; resume:KIND:STAGE:NAME, the whole of it, by the host's universal
path; loop:KIND:STAGE:NAME, which saves under that name after each step and keeps one checkpoint; or
again:KIND:STAGE:NAME, which reads that by as many ranks. KIND is adam, or tp: Adam under tensor parallelism of all
ranks. OUT holds for each WHAT what then is whole, by parameter: the masters, Adam's moments and the anchor; or the
error.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from common import arguments, optimiser
from device import DEVICE

# isort: split
import torch
import torch.distributed as dist
from deepspeed import zero
from deepspeed.utils import safe_get_full_fp32_param
from openrlhf.models import Actor
from openrlhf.utils.deepspeed import DeepspeedStrategy

from bond_plugin.host import checkpoints, weights

ROWS, STEPS = 6, 3
with open(sys.argv[1]) as file:
    argv = json.load(file)
out, root, asked = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
ranks = int(os.environ["WORLD_SIZE"])


def prepared(kind: str, stage: int, universal: bool) -> tuple:
    args = arguments(argv)
    args.ds.zero_stage, args.ds.use_universal_ckpt = stage, universal
    split = ranks if kind == "tp" else 1
    args.ds.tensor_parallel_size = split
    micro = ROWS * split // ranks
    strategy = DeepspeedStrategy(seed=0, micro_train_batch_size=micro, zero_stage=stage, args=args)
    strategy.setup_distributed()
    strategy.train_batch_size, strategy.accumulated_gradient = ROWS, 1
    torch.manual_seed(0)
    actor = Actor(args.actor.model_name_or_path, attn_implementation="sdpa", ds_config=strategy.get_ds_train_config())
    actor, *_ = strategy.prepare((actor, optimiser(args.actor)))
    return strategy, actor, micro


def whole(actor: Actor) -> dict:
    """All of it, gathered by DeepSpeed: what is not the masters stands in their place for a moment."""
    kept, params = weights.of(actor), dict(actor.model.module.named_parameters())
    masters, link = kept._sharded.masters(), getattr(actor.model.optimizer, "_link_all_hp_params", None)
    if link is not None:
        link()  # DeepSpeed's universal loading leaves them at the moments
    adam = [actor.model.optimizer.optimizer.state.get(master, {}) for master in masters]
    parts = {"masters": [master.detach().clone() for master in masters], "anchor": kept._sets["anchor"]}
    parts |= {moment: [one[moment] for one in adam] for moment in ("exp_avg", "exp_avg_sq") if moment in adam[0]}
    found = {"steps": (actor.model.global_steps, kept._steps_seen), "adam": [int(one.get("step", 0)) for one in adam]}
    for what in ("anchor", "exp_avg", "exp_avg_sq", "masters"):
        for master, part in zip(masters, parts.get(what, ()), strict=False):
            master.data.copy_(part)
        found[what] = {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in params.items()}
    found["groups"] = [group["weight_decay"] for group in actor.model.optimizer.optimizer.param_groups]
    with zero.GatheredParameters(list(params.values()), enabled=actor.model.zero_optimization_stage() == 3):
        found["module"] = {name: p.detach().cpu().clone() for name, p in params.items()}
    return found


def digest(found: dict) -> str:
    parts = (found[what][name] for what in ("masters", "exp_avg", "anchor") for name in sorted(found[what]))
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def train(strategy: DeepspeedStrategy, actor: Actor, micro: int, steps: int = STEPS) -> None:
    data = torch.Generator().manual_seed(0)
    place = dist.get_rank() * micro % ROWS
    for _ in range(steps):
        ids = torch.randint(2, 28, (ROWS, 16), generator=data)[place : place + micro].to(DEVICE)
        strategy.backward(actor.model(input_ids=ids, labels=ids).loss, actor, None)
        strategy.optimizer_step(None, actor, None)
        weights.of(actor).after_optimizer_step()


def run(what: str, kind: str, stage: str, name: str = "") -> dict:
    strategy, actor, micro = prepared(kind, int(stage), what == "resume")
    kept = weights.of(actor)
    if what == "save":
        train(strategy, actor, micro)
        folder = root / f"{ranks}-{kind}-{stage}"
        strategy.save_ckpt(actor.model, str(folder), "global_step3", 3, 1000, {"told": 3})
        return whole(actor)
    while what == "loop":  # until it is killed
        train(strategy, actor, micro, 1)
        told = {"told": digest(whole(actor))}
        strategy.save_ckpt(actor.model, str(root / name), f"global_step{actor.model.global_steps}", 1, 1000, told)
    for part in kept._sets["anchor"]:
        part.fill_(float("nan"))
    try:
        if what == "anchor":
            folder = root / name / "global_step3"
            kept.load_anchor(checkpoints._anchor_states(folder), str(folder))
            return whole(actor)
        _, states = strategy.load_ckpt(actor.model, str(root / name))
        found = whole(actor)
        return {**found, "told": states["told"], "digest": digest(found)}
    except weights.CheckpointError as error:
        return {"error": str(error)}


results = {each: run(*each.split(":")) for each in asked}
if dist.get_rank() == 0:
    torch.save(results, out)
dist.barrier()
