"""What one sample of a trained policy costs at inference, beside Best-of-N of the initial policy at an equal reward.

    make train
    .venv/bin/python benchmarks/inference.py --before demo/model --after runs/jbond

Both sample with vLLM, the models in turn, several rounds; an engine's start and its first pass over the prompts do
not count. Best-of-N counts N samples a prompt and their rewards, the trained policy one sample and no reward. Prints
the mean reward, tokens, seconds of sampling and seconds of scoring a prompt; then which N would give the trained
policy's reward, and what that N costs beside it (between two N: by interpolation).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from statistics import mean, median
from typing import Any

import torch

from bond_plugin.bestofn.estimates import expected_max
from bond_plugin.offline.engine import PromptSamples, stream


def draw(model: Path, prompts: list[str], n: int, seed: int, limit: int) -> tuple[float, list[PromptSamples]]:
    """Seconds of sampling n responses to each prompt, and the samples: the second of two passes."""
    passes = stream(model, prompts * 2, n, chunk=len(prompts), max_new_tokens=limit, temperature=1.0, seed=seed)
    next(passes)
    started = time.perf_counter()
    (samples,) = passes
    return time.perf_counter() - started, samples


def main(arguments: list[str] | None = None) -> None:
    """Run all, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder of the initial policy")
    parser.add_argument("--after", type=Path, required=True, help="folder of the trained policy")
    parser.add_argument("--prompts", type=Path, default=Path("demo/heldout.jsonl"), help='JSON lines, "input"')
    parser.add_argument("--reward", type=Path, default=Path("recipes/reviews/reward.py"), help="a Python file")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 8], help="N (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/inference"))
    given = parser.parse_args(arguments)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(line)["input"] for line in given.prompts.read_text(encoding="utf-8").splitlines()]
    reward_func = run_path(str(given.reward))["reward_func"]

    def once(model: Path, n: int, seed: int) -> dict[str, Any]:
        seconds, samples = draw(model, prompts, n, seed, given.max_new_tokens)
        started = time.perf_counter()
        rewards = [
            reward_func(s.queries, [p] * n, [None] * n)["rewards"] for p, s in zip(prompts, samples, strict=True)
        ]
        scoring = time.perf_counter() - started
        return {
            "rewards": torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in rewards]),
            "tokens": sum(len(ids) for s in samples for ids in s.response_ids) / len(prompts),
            "sampling": seconds / len(prompts),
            "scoring": scoring / len(prompts),
        }

    sides = {f"Best-of-{n} of the initial policy": (given.before, n) for n in given.levels}
    sides["one sample of the trained policy"] = (given.after, 1)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(given.rounds):
        for name, (model, n) in sides.items():
            print(f"round {turn + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(once(model, n, turn))
    *best, trained = (
        {
            "side": name,
            "n": n,
            "reward": mean(expected_max(one["rewards"], n).mean().item() for one in found[name]),
            **{key: median(one[key] for one in found[name]) for key in ("tokens", "sampling", "scoring")},
        }
        for name, (_, n) in sides.items()
    )
    trained["scoring"] = 0.0  # it is not needed
    print(f"{'':36}{'reward':>8}{'tokens':>9}{'sampling s':>12}{'scoring s':>11}   a prompt")
    for row in (*best, trained):
        print(
            f"{row['side']:36}{row['reward']:8.3f}{row['tokens']:9.1f}{row['sampling']:12.4f}{row['scoring']:11.4f}"
        )
    found_equal = None
    for low, high in pairwise(best):
        if low["reward"] <= trained["reward"] <= high["reward"]:
            share = (trained["reward"] - low["reward"]) / (high["reward"] - low["reward"])
            at = {key: low[key] + share * (high[key] - low[key]) for key in ("tokens", "sampling", "scoring")}
            n = math.exp(math.log(low["n"]) + share * math.log(high["n"] / low["n"]))
            seconds = (at["sampling"] + at["scoring"]) / trained["sampling"]
            found_equal = {"n": n, "tokens": at["tokens"] / trained["tokens"], "seconds": seconds}
            print(
                f"at the trained policy's reward, Best-of-{n:.1f}: {found_equal['tokens']:.2f} times the tokens, "
                f"{seconds:.2f} times the seconds"
            )
    if found_equal is None:
        print(f"no N between {given.levels[0]} and {given.levels[-1]} has the trained policy's reward: see --levels")
    record = {"sides": [*best, trained], "equal": found_equal}
    (given.output_dir / "inference.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
