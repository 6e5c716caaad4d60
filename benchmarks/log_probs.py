"""What log-probabilities cost over long vocabularies: the host's way beside `--bond.logits_mb`, time and peak memory.

    .venv/bin/python benchmarks/log_probs.py
    .venv/bin/python benchmarks/log_probs.py --vocabulary 32768 262144 --length 512 8192 --dtype fp32
    .venv/bin/python benchmarks/log_probs.py --width 64 --layers 1      next to nothing but the output layer

Runs the host's own `Actor`, forward and backward, on one sequence of responses' tokens, under a made Llama; each way
in a process of its own, in turn, several rounds. Prints median seconds, the most memory over what model and process
take at rest, the ratios, and by how much the log-probabilities differ at the most. Sizes that the host's way has no
memory for on this machine are computed by ours alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psutil

WAYS = ("host", "ours")
HELD = 18  # bytes a number of [tokens, vocabulary] in the host's way: 16 bits once, fp32 four times
REPEATS = 3  # in a process, of which the first does not count


def once(way: str, vocabulary: int, length: int, given: argparse.Namespace, out: Path) -> None:
    """In a process of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "workers"))
    from device import DEVICE

    # isort: split
    import resource

    import torch
    from openrlhf.models import Actor
    from transformers import LlamaConfig, LlamaForCausalLM

    from bond_plugin.host import logits

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=given.width, intermediate_size=2 * given.width,
        num_hidden_layers=given.layers, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=length,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to({"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]).to(DEVICE)
    actor = Actor(model)
    actor.packing_samples = False
    ids = torch.randint(0, vocabulary, (1, length), device=DEVICE)
    mask = torch.ones_like(ids)
    weights = torch.randn(1, length - 1, device=DEVICE)

    def step() -> torch.Tensor:
        found = actor(ids, mask[:, 1:], mask)
        (found * weights).sum().backward()
        return found.detach()

    def peak() -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    logits.limit_to(SimpleNamespace(bond=SimpleNamespace(logits_mb=given.logits_mb if way == "ours" else 0)))
    for p in actor.parameters():
        p.grad = torch.zeros_like(p)
    rest, seconds = peak(), []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        found = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.save(found.cpu(), out.with_suffix(f".{way}.pt"))
    out.write_text(json.dumps({"seconds": seconds[1:], "memory": peak() - rest}))


def main(arguments: list[str] | None = None) -> None:
    """Run all, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--width", type=int, default=512, help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--logits-mb", type=float, default=256.0, help="as --bond.logits_mb (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/log-probs"))
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    out = given.output_dir / "one.json"
    if given.once:
        once(given.once[0], int(given.once[1]), int(given.once[2]), given, out)
        return
    given.output_dir.mkdir(parents=True, exist_ok=True)
    import torch

    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    table = []
    print(f"{'vocabulary':>10}{'tokens':>8}{'seconds':>18}{'ratio':>8}{'peak GB':>18}{'ratio':>8}{'differ by':>12}")
    for vocabulary in given.vocabulary:
        for length in given.length:
            fits = HELD * vocabulary * length < 0.8 * memory
            found: dict[str, dict[str, list[float]]] = {
                way: defaultdict(list) for way in WAYS if way != "host" or fits
            }
            for _ in range(given.rounds):
                for way in found:
                    command = [sys.executable, __file__, "--once", way, str(vocabulary), str(length)]
                    options = ["--dtype", given.dtype, "--logits-mb", str(given.logits_mb)]
                    options += ["--width", str(given.width), "--layers", str(given.layers)]
                    options += ["--output-dir", str(given.output_dir)]
                    subprocess.run(
                        [*command, *options], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                    )
                    one = json.loads(out.read_text())
                    found[way]["seconds"] += one["seconds"]
                    found[way]["memory"].append(one["memory"])
            row = {"vocabulary": vocabulary, "length": length}
            row |= {f"{way}/{name}": median(values) for way, both in found.items() for name, values in both.items()}
            cells = [f"{vocabulary:10}{length:8}"]
            for name in ("seconds", "memory"):
                ours, host = row[f"ours/{name}"], row.get(f"host/{name}")
                row[f"ratio/{name}"] = ours / host if host else None
                cells += [f"{'–' if host is None else f'{host:.2f}':>9}{ours:9.2f}"]
                cells += [f"{'–' if host is None else f'{ours / host:.3f}':>8}"]
            if fits:
                one, other = (torch.load(out.with_suffix(f".{way}.pt")) for way in WAYS)
                row["difference"] = (one - other).abs().max().item()
                cells.append(f"{row['difference']:12.1e}")
            print("".join(cells), flush=True)
            table.append(row)
    (given.output_dir / "log_probs.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
