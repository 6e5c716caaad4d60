"""What keeping an anchor costs: seconds and memory of each of its parts, by the number of parameters.

    .venv/bin/python benchmarks/anchor.py
    .venv/bin/python benchmarks/anchor.py --parameters 135000000 1000000000 --zero-stage 3

Made Llamas, trained by the host's own strategy (real DeepSpeed, one rank), each in a process of its own. Prints of
each: seconds to move the average, to put the anchor in place and take it out again, and to measure its distance
(medians); those together per billion parameters; and the most memory that keeping and using it took beside the rest,
in bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

TESTS = Path(__file__).resolve().parent.parent / "tests"
REPEATS = 7
LAYERS, VOCABULARY = 8, 4096


def once(parameters: int, stage: int, out: Path) -> None:
    """In a process of its own."""
    sys.path[:0] = [str(TESTS), str(TESTS / "workers")]
    from device import DEVICE

    # isort: split
    import torch
    from common import arguments, optimiser
    from conftest import make_tiny, recipe_for, to_argv
    from openrlhf.models import Actor
    from openrlhf.utils.deepspeed import DeepspeedStrategy
    from transformers import LlamaConfig, LlamaForCausalLM

    from bond_plugin.host import weights

    with tempfile.TemporaryDirectory() as folder:  # for the arguments alone
        args = arguments(to_argv({**recipe_for(make_tiny(Path(folder) / "tiny")), "bond.kl_ref": False}))
    args.ds.zero_stage = stage
    strategy = DeepspeedStrategy(seed=0, micro_train_batch_size=1, zero_stage=stage, args=args)
    strategy.setup_distributed()
    strategy.train_batch_size = strategy.accumulated_gradient = 1
    # A layer has 4 width^2 in attention and 12 in the network; the embedding is tied.
    width = int((parameters / (16 * LAYERS)) ** 0.5) // 64 * 64
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    actor = Actor(LlamaForCausalLM(config).to(torch.bfloat16))
    kept_class, weights.Weights = weights.Weights, lambda *_: None  # first without
    actor, *_ = strategy.prepare((actor, optimiser(args.actor)))
    engine = actor.model
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())

    def train() -> None:
        ids = torch.randint(0, VOCABULARY, (1, 16)).to(DEVICE)
        strategy.backward(engine(input_ids=ids, labels=ids).loss, actor, None)
        strategy.optimizer_step(None, actor, None)

    train()
    if not engine.was_step_applied():
        raise RuntimeError("the training step was not taken: the average would not move")
    engine.optimizer.optimizer.state.clear()  # Adam's moments, 8 bytes a parameter: a billion's fit in 24 GB without
    reset, peak = _memory(DEVICE)
    rest = reset()
    engine.bond_weights = kept = kept_class(engine, 0.1, False, None)

    def swap() -> None:
        with kept.swapped_in("anchor"):
            pass

    def move() -> None:
        kept._steps_seen = engine.global_steps - 1  # as after a step
        kept.after_optimizer_step()

    found = {name: timed(part) for name, part in (("move", move), ("swap", swap), ("distance", kept.anchor_distance))}
    out.write_text(json.dumps({"parameters": count, **found, "bytes": (peak() - rest) / count}))


def timed(part: Callable[[], object]) -> float:
    """Median seconds of a call, the first not counted."""
    import torch

    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        part()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def _memory(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """(forget the peak so far and say what is taken now, the peak since then), in bytes."""
    import torch

    def field(name: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    def reset() -> int:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return field("VmRSS")

    return reset, torch.cuda.max_memory_allocated if device == "cuda" else lambda: field("VmHWM")


def main(arguments: list[str] | None = None) -> None:
    """Run all, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[10_000_000, 50_000_000, 135_000_000, 500_000_000]
    )
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/anchor"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    out = given.output_dir / "one.json"
    if given.once:
        once(given.parameters[0], given.zero_stage, out)
        return
    given.output_dir.mkdir(parents=True, exist_ok=True)
    table = []
    print(f"{'parameters':>12}{'move':>9}{'swap':>9}{'distance':>10}{'s a billion':>13}{'bytes each':>12}")
    for wanted in given.parameters:
        command = [sys.executable, __file__, "--once", "--parameters", str(wanted)]
        options = ["--zero-stage", str(given.zero_stage), "--output-dir", str(given.output_dir)]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        with (given.output_dir / "log.txt").open("w") as log:
            subprocess.run([*command, *options], check=True, stdout=log, stderr=log, env={**os.environ, **rank})
        row = json.loads(out.read_text())
        parts = [row[name] for name in ("move", "swap", "distance")]
        row["seconds a billion"] = sum(parts) / row["parameters"] * 1e9
        table.append(row)
        print(f"{row['parameters']:12,}{parts[0]:9.3f}{parts[1]:9.3f}{parts[2]:10.3f}"
              f"{row['seconds a billion']:13.2f}{row['bytes']:12.2f}", flush=True)  # fmt: skip
    (given.output_dir / "anchor.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
