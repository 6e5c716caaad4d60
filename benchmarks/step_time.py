"""What a step costs: pooled J-BOND beside the host's REINFORCE++ with a reference model, on as many samples.

    .venv/bin/python benchmarks/step_time.py --recipe recipes/reviews/jbond-cpu.yaml

All are `bond train` with the recipe's model, prompts, reward and sizes, in turn, several rounds, so that a machine
that gets slower meets all of them; the first with the host's own ways to log-probabilities and weight sync
(`--bond.logits_mb 0 --bond.sync_mb 0`). The first step of a run (caches, compilation) does not count. Prints the
median seconds of each part of a step, the ratio of the medians with the smallest and the largest ratio of a round,
and the most memory that all processes together took (their proportional set size, looked at twice a second).
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

import psutil

HOST = ["--algo.advantage.estimator", "reinforce_baseline", "--algo.kl.init_coef", "0.01"]
AS_IT_IS = ["--bond.logits_mb", "0", "--bond.sync_mb", "0"]
OURS = ["--algo.advantage.estimator", "jbond", "--bond.eta", "0.1"]
METHODS = {
    "REINFORCE++ with a reference": [*HOST, *AS_IT_IS],
    "the same under bond train": HOST,
    "J-BOND": OURS,
    "J-BOND in the host's ways": [*OURS, *AS_IT_IS],
    "J-BOND with gamma_ref": [*OURS, "--bond.gamma_ref", "0.1"],
    "J-BOND without bond/kl_ref": [*OURS, "--no-bond.kl_ref"],
}
FIRST = next(iter(METHODS))
MEMORY = "memory"
PARTS = ("timing/step_total", "timing/generation", "timing/make_experience", "timing/ppo_train", "timing/broadcast")


def without_algorithm(recipe: Path, folder: Path) -> Path:
    """The recipe without its own algorithm, so that each method can name its own."""
    import yaml

    found = yaml.safe_load(recipe.read_text())
    found.pop("algo", None)
    found["bond"] = {"device": found.get("bond", {}).get("device", "auto")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def memory(process: psutil.Process) -> float:
    """GB of a process and all that it started, memory that they share counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            total += each.memory_full_info().pss
    return total / 1e9


def run(name: str, flags: list[str], recipe: Path, folder: Path, steps: int, batch: int) -> dict[str, list[float]]:
    """The parts of the steps of one run but its first, in seconds, and its peak memory."""
    sizes = ["--data.max_samples", str(steps * batch), "--train.num_episodes", "1"]
    output = ["--ckpt.output_dir", str(folder), "--ckpt.path", str(folder / "checkpoints")]
    command = [sys.executable, "-m", "bond_plugin", "train", "--recipe", str(recipe), *flags, *sizes, *output]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        child = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, memory(child))
            time.sleep(0.5)
    if child.returncode:
        raise SystemExit(f"{name} failed (exit status {child.returncode}), see {folder / 'log.txt'}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return {part: [row[part] for row in rows] for part in PARTS} | {MEMORY: [peak]}


def main(arguments: list[str] | None = None) -> None:
    """Run all methods in turn, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/reviews/jbond-cpu.yaml"))
    parser.add_argument("--rounds", type=int, default=3, help="how often each method runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of a run, the first not counted (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=METHODS, help=f"some of the methods, beside {FIRST}")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/step-time"))
    given = parser.parse_args(arguments)
    if given.steps < 2 or given.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    import yaml

    batch = yaml.safe_load(given.recipe.read_text())["rollout"]["batch_size"]
    recipe = without_algorithm(given.recipe, given.output_dir)
    chosen = {name: flags for name, flags in METHODS.items() if name == FIRST or given.only in (None, [name])
              or name in (given.only or ())}  # fmt: skip
    rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in chosen}
    for turn in range(given.rounds):
        for place, (name, flags) in enumerate(chosen.items()):
            print(f"round {turn + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            folder = given.output_dir / f"{turn}-{place}"
            rounds[name].append(run(name, flags, recipe, folder, given.steps, batch))

    total, found = PARTS[0], []
    first = {key: median(x for turn in rounds[FIRST] for x in turn[key]) for key in (total, MEMORY)}
    names = "".join(f"{part.partition('/')[2]:>17}" for part in PARTS)
    print(f"{'median seconds':34}{names}   ratio [rounds]{'peak GB':>17}  ratio")
    for name, turns in rounds.items():
        parts = {part: median(x for turn in turns for x in turn[part]) for part in (*PARTS, MEMORY)}
        ratios = [median(a[total]) / median(b[total]) for a, b in zip(turns, rounds[FIRST], strict=True)]
        ratio, of_memory = (parts[key] / first[key] for key in (total, MEMORY))
        found.append({"method": name, "seconds": parts, "ratio": ratio, "rounds": ratios, "memory": of_memory})
        seconds = "".join(f"{parts[part]:17.2f}" for part in PARTS)
        spread = f"{ratio:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:34}{seconds}   {spread}{parts[MEMORY]:13.2f}  {of_memory:.3f}")
    (given.output_dir / "step_time.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
