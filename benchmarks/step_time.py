"""What a step costs beside the host's own, on as many samples.

    .venv/bin/python benchmarks/step_time.py --against reference    pooled J-BOND, REINFORCE++ with a reference model
    .venv/bin/python benchmarks/step_time.py --against rloo         pooled J-BOND, RLOO, three samples a prompt each
    .venv/bin/python benchmarks/step_time.py --against no-cache     vBoN with a reward cache, its estimator without
    .venv/bin/python benchmarks/step_time.py --against sync --steps 10
                                  weight sync by `--bond.sync_mb`, in steps with little else: see broadcast's column

All are `bond train` with the recipe's model, prompts, reward and sizes, in turn, several rounds, so that a machine
that gets slower meets all of them; the first with the host's own ways to log-probabilities and weight sync
(`--bond.logits_mb 0 --bond.sync_mb 0`). The first step of a run (caches, compilation) does not count. Prints the
median seconds of each part of a step, the ratio of the medians with the smallest and the largest ratio of a round,
and the most memory that all processes together took (their proportional set size, looked at twice a second). Which
process had how much of it is in step_time.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

HOST = ["--algo.advantage.estimator", "reinforce_baseline", "--algo.kl.init_coef", "0.01"]
RLOO = ["--algo.advantage.estimator", "rloo", "--algo.kl.init_coef", "0.01"]
THREE = [
    *("--rollout.n_samples_per_prompt", "3", "--rollout.micro_batch_size", "{batch}"),
    *("--train.batch_size", "{batch}", "--train.micro_batch_size", "{batch}"),
]
SHORT = [
    *("--rollout.batch_size", "2", "--rollout.n_samples_per_prompt", "2", "--rollout.max_new_tokens", "4"),
    *("--rollout.micro_batch_size", "4", "--train.batch_size", "4", "--train.micro_batch_size", "4"),
    *("--data.max_samples", "{short}", "--no-bond.kl_ref"),
]
AS_IT_IS = ["--bond.logits_mb", "0", "--bond.sync_mb", "0"]
OURS = ["--algo.advantage.estimator", "jbond", "--bond.eta", "0.1"]
VBON = ["--reward.transform", "vbon", "--vbon.n", "4", "--bond.reward_cache", "{cache}"]
#: What is compared: the methods of each comparison, the one that the others are beside first.
METHODS = {
    "reference": {
        "REINFORCE++ with a reference": [*HOST, *AS_IT_IS],
        "the same under bond train": HOST,
        "J-BOND": OURS,
        "J-BOND in the host's ways": [*OURS, *AS_IT_IS],
        "J-BOND with gamma_ref": [*OURS, "--bond.gamma_ref", "0.1"],
        "J-BOND without bond/kl_ref": [*OURS, "--no-bond.kl_ref"],
    },
    "rloo": {
        "RLOO, 3 samples": [*RLOO, *THREE, *AS_IT_IS],
        "the same under bond train": [*RLOO, *THREE],
        "J-BOND, 3 samples": [*OURS, *THREE],
    },
    "sync": {
        "J-BOND, the host's sync": [*OURS, *SHORT, "--bond.sync_mb", "0"],
        "256 MiB at a time": [*OURS, *SHORT, "--bond.sync_mb", "256"],
        "64 MiB at a time": [*OURS, *SHORT, "--bond.sync_mb", "64"],
    },
    "no-cache": {
        "RLOO with a reference": [*RLOO, *AS_IT_IS],
        "the same under bond train": RLOO,
        "vBoN on RLOO, with a cache": [*RLOO[:2], *VBON],
    },
}
MEMORY, PROCESSES = "memory", "processes"
PARTS = ("timing/step_total", "timing/generation", "timing/make_experience", "timing/ppo_train", "timing/broadcast")


def without_algorithm(recipe: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The recipe without its own algorithm, so that each method can name its own; and what it says."""
    import yaml

    found = yaml.safe_load(recipe.read_text())
    found.pop("algo", None)
    found["bond"] = {"device": found.get("bond", {}).get("device", "auto")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(found))
    return path, found


def memory(process: psutil.Process) -> dict[str, float]:
    """GB of a process and all that it started, by their names; memory that they share counts once."""
    found: dict[str, float] = {}
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            name = each.name().partition(".")[0].strip()
            found[name] = found.get(name, 0.0) + each.memory_full_info().pss / 1e9
    return found


def run(name: str, flags: list[str], recipe: Path, folder: Path, sizes: list[str]) -> dict[str, Any]:
    """The parts of the steps of one run but its first, in seconds, and its peak memory."""
    output = ["--ckpt.output_dir", str(folder), "--ckpt.path", str(folder / "checkpoints")]
    command = [sys.executable, "-m", "bond_plugin", "train", "--recipe", str(recipe), *sizes, *flags, *output]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        child = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        peak: dict[str, float] = {}
        while child.poll() is None:
            peak = max(peak, memory(child), key=lambda by_name: sum(by_name.values()))
            time.sleep(0.5)
    if child.returncode:
        raise SystemExit(f"{name} failed (exit status {child.returncode}), see {folder / 'log.txt'}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return {part: [row[part] for row in rows] for part in PARTS} | {MEMORY: [sum(peak.values())], PROCESSES: peak}


def make_cache(recipe: Path, cache: Path, sizes: list[str]) -> None:
    """16 rewards of each prompt, for vBoN, once."""
    command = [sys.executable, "-m", "bond_plugin", "cache", "--recipe", str(recipe), *sizes]
    options = ["--cache.samples", "16", "--cache.output", str(cache), "--ckpt.output_dir", str(cache.parent / "none")]
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run all methods in turn, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=METHODS, default="reference", help="see above (default: %(default)s)")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/reviews/jbond-cpu.yaml"))
    parser.add_argument("--rounds", type=int, default=3, help="how often each method runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of a run, the first not counted (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="some of the methods, beside the first")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/step-time"))
    given = parser.parse_args(arguments)
    if given.steps < 2 or given.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    methods = METHODS[given.against]
    base, *others = methods
    if unknown := set(given.only or ()) - set(others):
        parser.error(
            f"--only {unknown.pop()!r}: with --against {given.against} there are {', '.join(map(repr, others))}"
        )
    folder = given.output_dir / given.against
    folder.mkdir(parents=True, exist_ok=True)
    recipe, said = without_algorithm(given.recipe, folder)
    prompts, cache = said["rollout"]["batch_size"], folder / "rewards.jsonl"
    sizes = ["--data.max_samples", str(given.steps * prompts), "--train.num_episodes", "1"]
    places = {"{batch}": str(3 * prompts), "{cache}": str(cache), "{short}": str(2 * given.steps)}
    chosen = {name: [places.get(flag, flag) for flag in methods[name]] for name in (base, *(given.only or others))}
    if any(str(cache) in flags for flags in chosen.values()):
        make_cache(recipe, cache, sizes)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for turn in range(given.rounds):
        for place, (name, flags) in enumerate(chosen.items()):
            print(f"round {turn + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(run(name, flags, recipe, folder / f"{turn}-{place}", sizes))

    total, found = PARTS[0], []
    first = {key: median(x for turn in rounds[base] for x in turn[key]) for key in (total, MEMORY)}
    names = "".join(f"{part.partition('/')[2]:>17}" for part in PARTS)
    print(f"{'median seconds':34}{names}   ratio [rounds]{'peak GB':>17}  ratio")
    for name, turns in rounds.items():
        parts = {part: median(x for turn in turns for x in turn[part]) for part in (*PARTS, MEMORY)}
        ratios = [median(a[total]) / median(b[total]) for a, b in zip(turns, rounds[base], strict=True)]
        ratio, of_memory = (parts[key] / first[key] for key in (total, MEMORY))
        found.append({"method": name, "seconds": parts, "ratio": ratio, "rounds": ratios, "memory": of_memory})
        found[-1] |= {PROCESSES: [turn[PROCESSES] for turn in turns]}
        seconds = "".join(f"{parts[part]:17.2f}" for part in PARTS)
        spread = f"{ratio:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:34}{seconds}   {spread}{parts[MEMORY]:13.2f}  {of_memory:.3f}")
    (folder / "step_time.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
