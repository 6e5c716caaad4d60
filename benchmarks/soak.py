"""A long run of real processes on the tests' tiny model: does anything grow, does a step slow down?

    .venv/bin/python benchmarks/soak.py --steps 2000
    .venv/bin/python benchmarks/soak.py --steps 300 -- --algo.advantage.estimator reinforce_baseline

Trains pooled J-BOND; flags after `--` replace its own, so the second line is the host's REINFORCE++. Every so many
steps it records, of each process, private memory (USS), descriptors and threads; and Ray's session folder and object
store. Prints the growth of each per step (a line fitted to the last two thirds of the run) and the seconds of a step.
Exit status 1 if the run failed or a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import POOLED, make_tiny, with_flags
from running import Running, role

RECORD = "soak.jsonl"  # one object each time it looks
LOOKS = 6  # the fewest for a line
START_SECONDS, STEP_SECONDS = 600, 300  # the longest that the first and any other step may take
#: What a run of thousands of steps can bear: MB a step of one process, descriptors and files a step, and how much
#: longer a step takes in the last third than in the first.
LIMITS = {"uss": 0.05, "fds": 0.01, "threads": 0.01, "files": 0.1, "slower": 1.15}
#: A rate too low to move the policy far, so that the last steps are as long as the first.
STEADY = {
    "algo.advantage.estimator": "jbond",
    **POOLED,
    "actor.adam.lr": 1e-6,
    "ckpt.max_num": 2,
    "ckpt.save_steps": 100,
    "data.max_samples": 400,
}
STEPS_PER_EPISODE = 25


def look(run: Running, session: Path) -> dict[str, Any]:
    """The processes by their role, Ray's files, and the object store (in MB, as everything)."""
    processes, store, seen = {}, 0.0, Counter[str]()
    for pid, command in sorted(run.processes().items()):
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            name = role(command)
            seen[name] += 1
            processes[f"{name} {seen[name]}" if seen[name] > 1 else name] = {
                "pid": pid,
                "uss": process.memory_full_info().uss / 1e6,
                "fds": process.num_fds(),
                "threads": process.num_threads(),
            }
            if name == "raylet":
                store = sum(part.rss for part in process.memory_maps() if "plasma" in part.path) / 1e6
    files = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files) / 1e6
    return {"step": run.steps, "processes": processes, "store": store, "files": len(files), "size": size}


def soak(folder: Path, steps: int, every: int, flags: dict[str, Any]) -> int:
    """Train and record. Returns the run's exit status."""
    session = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # Ray's sockets have a limit on the path's length
    tiny = make_tiny(folder / "tiny")
    wanted = with_flags({**STEADY, "train.num_episodes": -(-steps // STEPS_PER_EPISODE)}, flags)
    try:
        with Running(tiny, folder, wanted, RAY_TMPDIR=str(session)) as run, (folder / RECORD).open("w") as record:
            after, changed = every, time.monotonic()
            while run.process.poll() is None:
                if run.steps >= after:
                    json.dump(look(run, session), record)
                    record.write("\n")
                    record.flush()
                    after, changed = run.steps + every, time.monotonic()
                elif time.monotonic() - changed > START_SECONDS + every * STEP_SECONDS:
                    raise SystemExit(f"no step since {run.steps}: see {run.log}")
                time.sleep(0.2)
            return run.process.returncode
    finally:
        shutil.rmtree(session, ignore_errors=True)


def growth(found: list[tuple[int, float]]) -> float:
    """The slope of a line through the last two thirds of (step, value)."""
    return linear_regression(*zip(*found[len(found) // 3 :], strict=True)).slope


def report(folder: Path) -> bool:
    """Print the table and the verdict. Returns whether everything is within its limit."""
    looks = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
    if len(looks) < LOOKS:
        raise SystemExit(f"{len(looks)} looks are too few for a line: more --steps, or fewer steps between (--every)")
    beyond: list[str] = []

    def row(name: str, kind: str, found: list[tuple[int, float]], unit: str) -> None:
        slope = growth(found)
        wrong = slope > LIMITS.get(kind, float("inf"))
        print(f"{name:34}{kind:>9}{found[0][1]:11.1f}{found[-1][1]:11.1f}{slope:13.4f} {unit}{'  BEYOND' * wrong}")
        if wrong:
            beyond.append(f"{name}: {kind} grows by {slope:.4f} {unit} a step, limit {LIMITS[kind]}")

    print(f"{looks[-1]['step']} steps\n{'':34}{'':9}{'first':>11}{'last':>11}{'a step':>13}")
    for name, first in looks[0]["processes"].items():
        found = [(each["step"], each["processes"].get(name)) for each in looks]
        found = [(step, process) for step, process in found if process and process["pid"] == first["pid"]]
        if len(found) >= LOOKS:
            for kind, unit in (("uss", "MB"), ("fds", ""), ("threads", "")):
                row(name, kind, [(step, process[kind]) for step, process in found], unit)
    for name, kind, what, unit in (("Ray's session folder", "files", "files", ""),
                                   ("Ray's session folder", "size", "size", "MB"),
                                   ("Ray's object store", "resident", "store", "MB")):  # fmt: skip
        row(name, kind, [(each["step"], each[what]) for each in looks], unit)
    seconds = [json.loads(line)["timing/step_total"] for line in (folder / "out" / "metrics.jsonl").open()][1:]
    third = len(seconds) // 3
    first, last = median(seconds[:third]), median(seconds[-third:])
    print(f"seconds of a step, median: first third {first:.3f}, last third {last:.3f}, ratio {last / first:.3f}")
    if last / first > LIMITS["slower"]:
        beyond.append(f"a step takes {last / first:.2f} times as long at the end, limit {LIMITS['slower']}")
    print("\n".join(beyond) or "everything is within its limit")
    return not beyond


def main(arguments: list[str] | None = None) -> int:
    """Run, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="rounded up to 25 (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between two looks (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--report", action="store_true", help="only print what the folder holds")
    parser.add_argument("flags", nargs="*", help="of bond train, after --")
    given = parser.parse_args(arguments)
    folder = given.output_dir.resolve()
    status = 0
    if not given.report:
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"--output-dir {folder} is not empty")
        status = soak(folder, given.steps, given.every, named(given.flags))
        if status:
            print(f"the run ended with status {status}: see {folder / 'log.txt'}", file=sys.stderr)
    return 1 if not report(folder) or status else 0


def named(argv: list[str]) -> dict[str, Any]:
    """``--name value`` or ``--name`` as the tests keep flags."""
    flags: dict[str, Any] = {}
    for word in argv:
        if word.startswith("--"):
            flags[word[2:]] = True
        else:
            flags[list(flags)[-1]] = word
    return flags


if __name__ == "__main__":
    sys.exit(main())
