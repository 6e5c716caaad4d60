"""Run in each rank of a real DeepSpeed job: the host's own trainers on static and on dynamic batches.

usage: batches.py FLAGS.json OUT.pt KIND:ZERO_STAGE:MODE ...

KIND names one of the lists of flags. MODE is static (padded rows, one a
micro-batch), dynamic (packed, by tokens), broken (dynamic without what is attached) or windows (two steps).
"""

import json
import sys
from typing import Any

from common import arguments, optimiser
from device import DEVICE

# isort: split
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from openrlhf.models import Actor, get_llm_for_sequence_regression
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from openrlhf.trainer.ray.ppo_critic import CriticPPOTrainer
from openrlhf.utils.deepspeed import DeepspeedStrategy

from bond_plugin.host import loss, plan, weights
from bond_plugin.host.state import ROWS, Row

STEPS, TOKENS, LENGTH = 2, 48, 20
mark = loss.mark
with open(sys.argv[1]) as file:
    argv = json.load(file)
words = list(sys.argv)


def experience_of(count: int, selected: int) -> Experience:
    """``count`` rows of unequal length, the same on all ranks; every other one a source sample, if any are."""
    data = torch.Generator().manual_seed(0)
    first = torch.randint(0, 5, (count, 1), generator=data)
    last = torch.randint(8, LENGTH + 1, (count, 1), generator=data)
    place = torch.arange(LENGTH)
    mask = ((first <= place) & (place < last)).long()
    action_mask = ((first + 2 < place) & (place < last))[:, 1:]
    draw = torch.randn(4, count, LENGTH - 1, generator=data)
    targets = draw[0, :, 0].sigmoid().tolist()
    source = [selected > 0 and i % 2 == 1 for i in range(count)]
    return Experience(
        sequences=torch.randint(2, 28, mask.shape, generator=data) * mask,
        attention_mask=mask,
        action_mask=action_mask,
        action_log_probs=-3.3 + 0.3 * draw[0],
        advantages=draw[1] * action_mask,
        values=draw[2] * action_mask,
        returns=draw[3] * action_mask,
        rewards=torch.zeros(count),
        response_length=action_mask.sum(-1).float(),
        total_length=mask.sum(-1).float(),
        info={
            "reward": torch.zeros(count),
            ROWS: [Row(of, None if of else target) for of, target in zip(source, targets, strict=True)],
        },
    )


def run(kind: str, stage: int, mode: str) -> dict:
    args = arguments(argv[kind])
    dynamic = mode != "static"
    args.ds.zero_stage, args.ds.param_dtype = stage, "fp32"
    args.ds.packing_samples = args.train.dynamic_batch_enable = dynamic
    args.train.max_tokens_per_gpu = TOKENS
    args.train.micro_batch_size = 1
    steps = STEPS if mode == "windows" else 1
    args.rollout.batch_size *= steps
    loss.mark = (lambda *_: None) if mode == "broken" else mark

    strategy = DeepspeedStrategy(
        seed=0, max_norm=args.actor.max_norm, micro_train_batch_size=1, train_batch_size=args.train.batch_size,
        zero_stage=stage, args=args,
    )  # fmt: skip
    strategy.setup_distributed()
    torch.manual_seed(0)
    common = {
        "attn_implementation": "sdpa",
        "param_dtype": "fp32",
        "ds_config": strategy.get_ds_train_config(),
        "packing_samples": dynamic,
    }
    part = args.critic if "critic" in kind else args.actor
    cfg = optimiser(part)
    if "critic" in kind:
        model = get_llm_for_sequence_regression(
            args.actor.model_name_or_path, "critic", init_value_head=True, **common
        )
    else:
        model = Actor(args.actor.model_name_or_path, **common)
    model, optimizer, scheduler = strategy.prepare((model, cfg))
    if "critic" in kind:
        trainer = CriticPPOTrainer(strategy, model, optimizer, scheduler, micro_train_batch_size=1)
        engine, fit = model, trainer.ppo_train
    else:
        trainer = ActorPPOTrainer(strategy, model, None, optimizer, scheduler, micro_train_batch_size=1)
        engine, fit = model.model, lambda: trainer.ppo_train(0.0)

    rows = experience_of(steps * strategy.train_batch_size, plan.of(args).rows.selected)
    share = len(rows.sequences) // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    trainer.replay_buffer.append(
        Experience(**{
            name: {k: v[mine] for k, v in value.items()} if isinstance(value, dict) else value[mine]
            for name, value in vars(rows).items()
            if isinstance(value, (dict, torch.Tensor))
        })
    )  # fmt: skip
    found: dict[str, Any] = {"gradient": None, "backward": 0, "rates": []}
    if "critic" not in kind and not dynamic:
        with torch.no_grad():
            given = (part.to(DEVICE) for part in (rows.sequences, rows.action_mask, rows.attention_mask))
            found["log_probs"] = model(*given).cpu()
    step, backward = engine.step, engine.backward

    def counted(*a: Any, **k: Any) -> Any:
        found["backward"] += 1
        return backward(*a, **k)

    def watched(*a: Any, **k: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            found["gradient"] = torch.cat(
                [safe_get_full_grad(p).flatten().clone() for p in engine.module.parameters()]
            ).cpu()
            found["rates"].append(scheduler.get_last_lr()[0])
        return step(*a, **k)

    engine.step, engine.backward = watched, counted
    status, kept = fit(), weights.of(model)
    if kept is not None:
        both = zip(kept._sets["reference"], kept._sharded.masters(), strict=True)
        moved = torch.stack([(master - initial).norm().square() for initial, master in both]).sum()
        dist.all_reduce(moved)
        found["eta"], found["behind"] = args.bond.eta, status["bond/anchor_distance"] / moved.sqrt().item()
    found["finite"] = all(torch.isfinite(torch.as_tensor(v)).all().item() for v in status.values())
    found["steps"], found["last_rate"] = engine.global_steps, scheduler.get_last_lr()[0]
    found["window"] = sum(getattr(trainer.replay_buffer, "dynamic_optimizer_step", []))
    return found


results = {}
for asked in words[3:]:
    kind, stage, mode = asked.split(":")
    results[asked] = run(kind, int(stage), mode)
if dist.get_rank() == 0:
    torch.save(results, words[2])
dist.barrier()
