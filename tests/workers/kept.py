"""Run in each rank of a real DeepSpeed job: the anchor beside the host's own policy, prepared by the host.

usage: kept.py FLAGS.json OUT.json WHAT:ZERO_STAGE ...

WHAT is adam, muon or lora; tp: Adam under tensor parallelism of all ranks; or sleep: Adam with its states taken off
the device between two trainings.
"""

import json
import os
import sys
from pathlib import Path

from common import arguments, optimiser
from device import DEVICE

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import safe_get_full_fp32_param
from openrlhf.models import Actor
from openrlhf.trainer.ray.ppo_actor import offload_deepspeed_states, reload_deepspeed_states
from openrlhf.utils.deepspeed import DeepspeedStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from bond_plugin.host import checkpoints, weights

ETA, STEPS, PIECE = 0.1, 6, 1000
with open(sys.argv[1]) as file:
    argv = json.load(file)
words = list(sys.argv)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor for which memory is taken."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            there = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if made.untyped_storage().data_ptr() not in there:
                self.found = max(self.found, made.numel())
        return made


def run(what: str, stage: int) -> dict:
    args = arguments(argv)
    args.ds.zero_stage = stage
    ranks = int(os.environ["WORLD_SIZE"])
    args.ds.tensor_parallel_size = ranks if what == "tp" else 1
    strategy = DeepspeedStrategy(seed=0, micro_train_batch_size=2, zero_stage=stage, args=args)
    strategy.setup_distributed()
    strategy.train_batch_size = 2 * ranks // args.ds.tensor_parallel_size
    strategy.accumulated_gradient = 1
    torch.manual_seed(0)
    actor = Actor(
        args.actor.model_name_or_path,
        attn_implementation="sdpa",
        lora_rank=4 if what == "lora" else 0,
        target_modules="all-linear",
        ds_config=strategy.get_ds_train_config(),
    )
    args.actor.muon.lr = 2e-3
    actor, *_ = strategy.prepare((actor, optimiser(args.actor, "muon" if what == "muon" else "adam")))
    engine, kept = actor.model, weights.of(actor)
    params = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}

    def full(of: dict = params) -> dict:
        found = {}
        for name, p in of.items():
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                found[name] = p.detach().clone()
        return found

    def masters() -> dict:
        return {name: safe_get_full_fp32_param(p).detach().double().clone() for name, p in params.items()}

    def same(one: dict, other: dict) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    start, start16, base = masters(), full(), full(frozen)
    exact = {name: value.clone() for name, value in start.items()}
    data = torch.Generator().manual_seed(dist.get_rank())

    def train(steps: int) -> None:
        for _ in range(steps):
            ids = torch.randint(2, 28, (2, 16), generator=data).to(DEVICE)
            if what == "tp":
                dist.broadcast(ids, 0)
            loss = engine(input_ids=ids, labels=ids).loss
            strategy.backward(loss, actor, None)
            strategy.optimizer_step(None, actor, None)
            kept.after_optimizer_step()
            now = masters()
            for name in exact:
                exact[name] = (1 - ETA) * exact[name] + ETA * now[name]

    def swaps() -> dict:
        """What is in the parameters while other weights are in place, and whether they come back."""
        before = full()
        with kept.swapped_in("anchor"):
            anchor = full()
        between = full()
        with kept.swapped_in("reference"):
            reference = full()
        apart = sum(((anchor[n].double() - exact[n]) ** 2).sum() for n in exact).sqrt()
        moved = sum(((exact[n] - start[n]) ** 2).sum() for n in exact).sqrt()
        rounding = sum(((v.to(params[n].dtype).double() - v) ** 2).sum() for n, v in exact.items()).sqrt()
        return {
            "anchor": abs((apart - rounding) / moved).item(),  # no further off than rounding is
            "moved": any(not torch.equal(anchor[n], start16[n]) for n in anchor),
            "reference": same(reference, start16),
            "restored": same(before, between) and same(before, full()),
            "base": same(base, full(frozen)),
            "device": kept._sets["anchor"][0].device.type,
        }

    train(STEPS)
    found = {"trained": len(params), "frozen": len(frozen)}
    adam = getattr(engine.basic_optimizer, "aux_optimizer", engine.basic_optimizer)  # Muon has one for the rest
    found["adam"] = f"{type(adam).__module__}.{type(adam).__name__}"
    found["swaps"] = [swaps()]
    if what == "sleep":
        offload_deepspeed_states(engine)
        found["asleep"] = len(engine.optimizer.offloaded_states)
        found["swaps"].append(swaps())
        reload_deepspeed_states(engine)
        found["awake"] = len(engine.optimizer.offloaded_states)
        found["swaps"].append(swaps())
        train(2)
        found["swaps"].append(swaps())

    now = masters()
    squares = {name: ((now[name] - exact[name]) ** 2).sum() for name in exact}
    split = [name for name in squares if is_model_parallel_parameter(params[name])]
    parts = (
        torch.stack([squares.pop(name) for name in split]).sum() if split else torch.zeros((), dtype=torch.float64)
    )
    dist.all_reduce(parts)  # each rank has other parts of these, and the same of the rest
    found["distance_exact"] = (parts + sum(squares.values())).sqrt().item()
    found["split"] = len(split)
    found["distance"] = kept.anchor_distance()
    weights._PIECE, whole = PIECE, weights._PIECE
    with Largest() as seen:
        found["distance_in_pieces"] = kept.anchor_distance()
    weights._PIECE = whole
    found["piece"], found["largest"] = seen.found, max(part.numel() for part in kept._sets["anchor"])

    folder = f"{words[2]}.{what}.{stage}"
    strategy.save_ckpt(engine, folder, "step1", 3, 1000, {})
    saved = [part.clone() for part in kept._sets["anchor"]]
    before = masters()
    train(1)
    for part in kept._sets["anchor"]:
        part.zero_()
    strategy.load_ckpt(engine, folder)
    found["loaded"] = all(torch.equal(a, b) for a, b in zip(saved, kept._sets["anchor"], strict=True))
    found["masters_loaded"] = same(before, masters())
    found["files"] = os.path.exists(checkpoints.anchor_file(Path(folder, "step1"), dist.get_rank()))
    return found


results = {asked: run(asked.split(":")[0], int(asked.split(":")[1])) for asked in words[3:]}
if dist.get_rank() == 0:
    with open(words[2], "w") as file:
        json.dump(results, file)
dist.barrier()
