"""Seconds from the command to the end of the first step, `bond train` beside the host's own command; and of --help.

    .venv/bin/python benchmarks/startup.py

The tests' tiny model, so that nearly all of it is start-up; the estimator is the host's, so that both do the same
step. On a GPU the other side is `python -m openrlhf.cli.train_ppo_ray` as it is. Without one the host does not start,
so it has those of our hooks that make it run there, and no other: no checks, no metrics, no hooks of training. The
two in turn, several rounds; TensorBoard's own record says when the first step ended. Prints medians, and the ratio
with the smallest and the largest of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
TESTS = BENCHMARKS.parent / "tests"
HOST = "openrlhf.cli.train_ppo_ray"


def load_cpu_hooks() -> None:
    """What a process of the host needs on a machine without GPU. Ray runs it at the start of each worker."""
    from bond_plugin.host import hooks

    hooks.HOOKS = tuple(hook for hook in hooks.HOOKS if hook.cpu)
    hooks.arm()


def host(argv: list[str]) -> None:
    """The host's command in this process, with nothing of ours but what it cannot run without."""
    from bond_plugin.host import on_cpu
    from bond_plugin.host.launch import settle_device

    settle_device([])
    if on_cpu():
        import ray

        load_cpu_hooks()
        start = ray.init
        there = {name: value for name, value in os.environ.items() if name.startswith(("BOND_", "VLLM_", "OMP_"))}
        there["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))

        def ray_init(**options: Any) -> Any:
            given = options.pop("runtime_env", {})
            variables = {**there, **given.pop("env_vars", {})}
            environment = {**given, "env_vars": variables, "worker_process_setup_hook": "startup.load_cpu_hooks"}
            return start(**options, runtime_env=environment, num_gpus=2, num_cpus=6, include_dashboard=False)

        ray.init = ray_init
    sys.argv = [HOST, *argv]
    runpy.run_module(HOST, run_name="__main__")


def first_step(folder: Path, command: list[str]) -> float:
    """Seconds from the start of a training command to the first scalar of training that it logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder.mkdir(parents=True)
    started = time.time()
    output = ["--ckpt.output_dir", folder / "out", "--ckpt.path", folder / "ckpt", "--logger.tensorboard_dir", folder]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([*command, *map(str, output)], stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} … failed (exit status {done.returncode}), see {folder / 'log.txt'}"
        )
    (events,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    record = EventAccumulator(str(events)).Reload()
    return min(record.Scalars(tag)[0].wall_time for tag in record.Tags()["scalars"]) - started


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    """Run both in turn, print the table, write it as JSON."""
    if arguments is None and sys.argv[1:2] == ["--host"]:
        return host(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each runs (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/startup"))
    given = parser.parse_args(arguments)
    folder = given.output_dir.resolve() / time.strftime("%Y%m%d-%H%M%S")
    sys.path.insert(0, str(TESTS))
    from conftest import make_tiny, recipe_for, to_argv, torch_has_gpu, with_flags

    batch = {"data.max_samples": 8, "algo.advantage.estimator": "reinforce", "algo.kl.init_coef": 0.0}
    if not torch_has_gpu():  # what `bond train` sets by itself
        batch |= {"ds.attn_implementation": "sdpa", "vllm.sync_backend": "gloo", "vllm.enforce_eager": True}
    argv = to_argv(with_flags(recipe_for(make_tiny(folder / "tiny")), batch))
    bond = [sys.executable, "-m", "bond_plugin"]
    commands = {
        "the host's command": [sys.executable, __file__, "--host"],
        "bond train": [*bond, "train"],
    }
    found: dict[str, list[float]] = {name: [] for name in (*commands, "bond train --help")}
    for turn in range(given.rounds):
        for name, command in commands.items():
            print(f"round {turn + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(first_step(folder / f"{turn}-{name.split()[0]}", [*command, *argv]))
        found["bond train --help"].append(seconds([*bond, "train", "--help"]))
    first = next(iter(found.values()))
    for name, each in found.items():
        ratios = [mine / theirs for mine, theirs in zip(each, first, strict=True)]
        ratio = f"{median(each) / median(first):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:24}{median(each):8.2f} s   {ratio if name in commands else ''}")
    (folder / "startup.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
