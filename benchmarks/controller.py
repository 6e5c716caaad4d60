"""What a step costs the process that makes advantages: seconds and memory by the number of samples in the rollout.

    .venv/bin/python benchmarks/controller.py
    .venv/bin/python benchmarks/controller.py --samples 4096 --tokens 8192 --only jbond

The host's own experience maker, called as in a run, on samples as its sampler makes them, in its micro-batches of
eight; log-probabilities are random numbers. Each line is a process of its own. ``the host's loop`` is its own path to
advantages (REINFORCE++), ``reinforce`` the same under `bond train`. The others are ours over the same experiences:
J-BOND in its pooled form, with log-probabilities of an anchor; Algorithm 2, with two samples of the anchor a prompt,
where a rollout's rows are selected and dealt to the ranks here; and vBoN, which changes the host's rewards.

Prints medians of seconds, and of what parts of ours take; and bytes a sample: of the experiences, and the most that
making advantages took beside them.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
REPEATS = 3
N, PROMPT_TOKENS, CACHED = 8, 64, 64

#: Flags by name. Algorithm 2 has as many rows a prompt as the others: seven of the policy, and a selected one.
WAYS: dict[str, dict[str, Any]] = {
    "the host's loop": {"algo.advantage.estimator": "reinforce"},
    "reinforce": {"algo.advantage.estimator": "reinforce"},
    "jbond": {"bond.n_anchor_samples": 0, "rollout.n_samples_per_prompt": N, "bond.kl_ref": False},
    "algorithm 2": {"bond.n_anchor_samples": 2, "rollout.n_samples_per_prompt": N - 1, "bond.kl_ref": False},
    "vbon": {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon"},
}
#: What is timed within ours.
PARTS = ("tokens", "rows", "algorithm", "spread", "gaps", "dealing")


def once(way: str, samples: int, tokens: int, out: Path) -> None:
    """In a process of its own."""
    from anchor import _memory  # of the file beside this one

    sys.path[:0] = [str(TESTS), str(TESTS / "workers")]
    import device  # noqa: F401, before anything of the host

    # isort: split
    import torch
    from common import arguments
    from conftest import make_tiny, recipe_for, to_argv, with_flags
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from bond_plugin.algorithms import assemble
    from bond_plugin.host import advantages, state
    from bond_plugin.offline.reward_cache import Writer

    generator = torch.Generator().manual_seed(0)
    prompts = samples // N
    names = [f"prompt {i}" for i in range(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"rollout.batch_size": prompts, "rollout.n_samples_per_prompt": N, "train.batch_size": samples}
        flags |= {"rollout.micro_batch_size": 8, "data.max_len": PROMPT_TOKENS + tokens, **WAYS[way]}
        flags["rollout.max_new_tokens"] = tokens
        if way == "vbon":
            flags["bond.reward_cache"] = str(Path(folder) / "rewards.jsonl")
        args = arguments(to_argv(with_flags(recipe_for(make_tiny(Path(folder) / "tiny")), flags)))
        if way == "vbon":
            with Writer(flags["bond.reward_cache"], {}) as writer:
                for name in names:
                    writer.append(name, torch.randn(CACHED, generator=generator).tolist())
            from bond_plugin.offline import make_cache

            make_cache.of(args)  # read at the first step
    strategy, tokenizer = SimpleNamespace(args=args), SimpleNamespace(pad_token_id=0)
    maker = RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    if way == "the host's loop":
        maker.get_cumulative_returns = functools.partial(inspect.unwrap(type(maker).get_cumulative_returns), maker)
    elif way not in ("reinforce", "vbon"):
        maker.advantage_estimator = "reinforce"  # as our trainer sets it
    sampler = object.__new__(SamplesGenerator)

    def sample(name: str) -> Any:
        length = int(torch.randint(tokens // 2, tokens + 1, (), generator=generator))
        whole = PROMPT_TOKENS + length
        response = {
            "prompt": name,
            "label": "",
            "observation_tokens": torch.randint(1, 1000, (whole,), generator=generator).tolist(),
            "action_ranges": [(PROMPT_TOKENS, whole)],
            "rollout_log_probs": [0.0] * PROMPT_TOKENS + (-torch.rand(length, generator=generator)).tolist(),
            "reward": float(torch.randn((), generator=generator)),
        }
        return sampler._process_response_into_experience(response, max_len=PROMPT_TOKENS + tokens)

    kept = state.of(maker)

    def forward(batches: list[Any]) -> list[Any]:
        """In the place of the models: log-probabilities near the engine's."""
        kept.log_probs = {"anchor": []}
        for e in batches:
            noise = torch.randn(e.rollout_log_probs.shape, generator=generator)
            e.action_log_probs = torch.where(e.action_mask.bool(), e.rollout_log_probs + 0.01 * noise, 0.0)
            moved = torch.where(e.action_mask.bool(), 0.001 * noise, 0.0)
            kept.log_probs["anchor"].append(e.action_log_probs + moved)
            e.base_action_log_probs = e.values = None
            e.kl = torch.zeros_like(e.action_log_probs)
            e.info["kl"] = e.info["logprobs_diff"] = torch.zeros(len(e.sequences))
        return batches

    parts = dict.fromkeys(PARTS, 0.0)

    def timed(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*given: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*given, **more)
            finally:
                parts[part] += time.perf_counter() - started

        setattr(owner, name, call)

    batch = advantages.Batch
    for owner, name, part in (
        (batch, "tokens", "tokens"), (batch, "__init__", "rows"), (batch, "rows", "rows"),
        (batch, "spread", "spread"), (assemble, "advantages", "algorithm"), (advantages, "engine_gaps", "gaps"),
        (advantages, "for_training", "dealing"),
    ):  # fmt: skip
        timed(owner, name, part)

    found, reset_peak = [], _memory("cpu")
    for _ in range(REPEATS + 1):
        if way == "algorithm 2":
            policy = [sample(name) for name in names for _ in range(N - 1)]
            kept.source_samples = [sample(name) for name in names for _ in range(2)]
            maker.make_experience = forward
            call: Callable[[], Any] = functools.partial(maker.make_experience_batch, policy)
        else:
            batches = forward(maker.split_rollout_samples([sample(name) for name in names for _ in range(N)]))
            call = functools.partial(maker.compute_advantages_and_returns, batches)
        parts.update(dict.fromkeys(PARTS, 0.0))
        reset, peak = reset_peak
        rest = reset()
        started = time.perf_counter()
        made = call()
        seconds = time.perf_counter() - started
        took = peak() - rest
        size = sum(value.nbytes for e in made for value in vars(e).values() if isinstance(value, torch.Tensor))
        found.append({"seconds": seconds, "bytes": took / samples, "of experiences": size / samples, **parts})
        assert all(e.advantages is not None for e in made)
        del made, call
        batches = None
    out.write_text(json.dumps({key: median(one[key] for one in found[1:]) for key in found[0]}))


def main(given: list[str] | None = None) -> None:
    """Run all, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=2048, help="of the longest responses; the shortest have half")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/controller"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    out = args.output_dir / "one.json"
    if args.once:
        once(args.only[0], args.samples[0], args.tokens, out)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = []
    print(f"{'':16}{'samples':>8}{'seconds':>9}" + "".join(f"{part:>10}" for part in PARTS) + f"{'ms each':>9}"
          f"{'KB each':>9}{'KB taken':>10}")  # fmt: skip
    for samples in args.samples:
        for way in args.only:
            command = [sys.executable, __file__, "--once", "--samples", str(samples), "--tokens", str(args.tokens)]
            with (args.output_dir / "log.txt").open("w") as log:
                command += ["--only", way, "--output-dir", str(args.output_dir)]
                subprocess.run(command, check=True, stdout=log, stderr=log)
            row = json.loads(out.read_text())
            table.append({"way": way, "samples": samples, "tokens": args.tokens, **row})
            print(f"{way:16}{samples:8,}{row['seconds']:9.3f}" + "".join(f"{row[part]:10.3f}" for part in PARTS)
                  + f"{row['seconds'] / samples * 1e3:9.3f}{row['of experiences'] / 1e3:9.1f}"
                  f"{row['bytes'] / 1e3:10.1f}", flush=True)  # fmt: skip
    (args.output_dir / "controller.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
