"""The estimators on many prompts: seconds by the number of prompts, beside the obvious loop over them.

    .venv/bin/python benchmarks/mathematics.py
    .venv/bin/python benchmarks/mathematics.py --prompts 10000 1000000 --samples 64

The loop is plain Python, one sample after the other, on the first prompts, in the same process; its seconds are
scaled to as many prompts. Prints seconds, seconds a million samples, and how many times as long the loop takes; and
by how much the two differ at the most.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import log_bon_ratio, quantiles
from bond_plugin.bestofn.pooled import harmonic_log_quantile, pooled_tilt

N = 4


def best_of_n(rewards: Tensor, weights: Tensor) -> Tensor:
    """log pi_BoN / pi_ref among cached rewards (BOND with a cache)."""
    return log_bon_ratio(*quantiles(rewards, rewards, include_self=True), N)


def best_of_n_loop(rewards: list[float], weights: list[float]) -> list[float]:
    found, size = [], len(rewards) + 1
    for mine in rewards:
        below = sum(other < mine for other in rewards) / size
        equal = (sum(other == mine for other in rewards) + 1) / size
        found.append(math.log(((below + equal) ** N - below**N) / equal))
    return found


def tilt(rewards: Tensor, weights: Tensor) -> Tensor:
    """g of Best-of-2 from the prompt's other samples (pooled J-BOND)."""
    return pooled_tilt(rewards, weights, 2)


def tilt_loop(rewards: list[float], weights: list[float]) -> list[float]:
    found = []
    for i, mine in enumerate(rewards):
        total = 0.0
        for j, (other, weight) in enumerate(zip(rewards, weights, strict=True)):
            if j != i:
                total += weight * ((other < mine) + 0.5 * (other == mine))
        found.append(2 * total / (len(rewards) - 1))
    return found


def log_quantile_loop(rewards: list[float], weights: list[float]) -> list[float]:
    found, others = [], len(rewards) - 1
    for i, mine in enumerate(rewards):
        symmetric = [1.0] + [0.0] * others  # of those above
        for j, (other, weight) in enumerate(zip(rewards, weights, strict=True)):
            if j != i and other >= mine:
                weight = weight if other > mine else weight / 2
                for k in range(others, 0, -1):
                    symmetric[k] += weight * symmetric[k - 1]
        found.append(-sum(symmetric[k] / k / math.comb(others, k) for k in range(1, others + 1)))
    return found


Loop = Callable[[list[float], list[float]], list[float]]
ESTIMATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Loop, int]] = {
    "quantiles and log ratio": (best_of_n, best_of_n_loop, 100),
    "pooled tilt, N = 2": (tilt, tilt_loop, 100),
    "harmonic log quantile": (harmonic_log_quantile, log_quantile_loop, 3),
}


def main(arguments: list[str] | None = None) -> None:
    """Run all, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/mathematics"))
    given = parser.parse_args(arguments)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    generator, table = torch.Generator().manual_seed(0), []
    print(f"{'':26}{'prompts':>10}{'seconds':>10}{'s a million':>13}{'the loop':>11}{'differ by':>12}")
    for name, (call, loop, few) in ESTIMATORS.items():
        for prompts in given.prompts:
            rewards = torch.randn(prompts, given.samples, generator=generator, dtype=torch.float64)
            weights = torch.rand(prompts, given.samples, generator=generator, dtype=torch.float64) * 2
            started = time.perf_counter()
            found = call(rewards, weights)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            plain = [loop(*rows) for rows in zip(rewards[:few].tolist(), weights[:few].tolist(), strict=True)]
            times = (time.perf_counter() - started) / few * prompts / seconds
            apart = (found[:few] - torch.tensor(plain, dtype=torch.float64)).abs().max().item()
            a_million = seconds / prompts / given.samples * 1e6
            table.append({"estimator": name, "prompts": prompts, "seconds": seconds, "loop": times, "apart": apart})
            print(f"{name:26}{prompts:10,}{seconds:10.2f}{a_million:13.3f}{times:10.0f}x{apart:12.1e}", flush=True)
    (given.output_dir / "mathematics.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
