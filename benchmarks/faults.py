"""Kill processes of runs at random moments, resume, and compare with a run that nothing happened to.

    .venv/bin/python benchmarks/faults.py --count 50

Each seed is a fault and a moment (tests/running.py). A run must end in time, say why, and leave nothing behind;
resumed, its metrics must be those of the undisturbed run. Goes on in the folder of an earlier call where it stopped.
Prints a table; exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import Run, Tiny, clean_environment, execute, make_tiny, recipe_for, to_argv, with_flags
from prefork import Server
from running import Fault, Running, draw, strike

from bond_plugin.host import PYTHON_VARIABLE, cpu

RECORD = "faults.jsonl"  # one object a seed
COMPARED = ("reward/policy", "reward/anchor", "bond/loss", "bond/kl_anchor", "bond/kl_ref", "bond/anchor_distance",
            "bond/win_rate", "actor_grad_norm")  # fmt: skip


class Trials:
    """Faults one after the other, with what they share: the model, undisturbed runs, and a process to copy."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder, self._server = folder, server
        self._tiny = Tiny(folder / "tiny") if (folder / "tiny").exists() else make_tiny(folder / "tiny")

    def run(self, seed: int) -> dict[str, Any]:
        """One row of the table. ``broken`` says which promise, and is empty if none was."""
        fault, moment = draw(seed)
        folder = self._folder / str(seed)
        row = {"seed": seed, "fault": str(fault), **asdict(moment), "broken": ""}
        try:
            with Running(self._tiny, folder, fault.flags(self._tiny)) as run:
                row |= asdict(strike(run, fault, moment))
            self._compare(self._train(fault, folder, resume=True), self._undisturbed(fault))
        except AssertionError as error:
            row["broken"] = str(error)
        return row

    def _train(self, fault: Fault, folder: Path, resume: bool = False) -> Run:
        """A run to its end, of copies of one process, because nothing happens to them."""
        flags = {**fault.flags(self._tiny), "ckpt.load_enable": resume}
        folders = {"ckpt.output_dir": str(folder / "out"), "ckpt.path": str(folder / "ckpt")}
        argv = to_argv(with_flags(recipe_for(self._tiny), folders | flags))
        python = str(self._server.python)
        done = execute([python, "-m", "bond_plugin", "train", *argv], folder,
                       OMP_NUM_THREADS="1", **{PYTHON_VARIABLE: python})  # fmt: skip
        assert done.status == 0, f"resumed: status {done.status}:\n{done.output[-5000:]}"
        return done

    def _undisturbed(self, fault: Fault) -> Run:
        kind = "rewarded" if fault.flags(self._tiny).get("reward.model_name_or_path") else "whole"
        folder = self._folder / kind
        if (folder / "out" / "config.json").exists():  # the model is saved last
            return Run(0, "", folder, 0.0)
        return self._train(fault, folder)

    @staticmethod
    def _compare(resumed: Run, whole: Run) -> None:
        steps = [[row["step"] for row in run.metrics] for run in (resumed, whole)]
        assert steps[0] == steps[1], f"resumed: steps {steps[0]}, undisturbed {steps[1]}"
        for mine, theirs in zip(resumed.metrics, whole.metrics, strict=True):
            for name in COMPARED:
                if name in theirs and mine[name] != pytest.approx(theirs[name], rel=1e-4, abs=1e-5):
                    raise AssertionError(f"resumed: {name} of step {mine['step']}: {mine[name]}, not {theirs[name]}")


def table(rows: list[dict[str, Any]]) -> None:
    """One line a fault, then how many kept every promise."""
    head = ("seed", "fault", "step", "in a", "at", "ends s", "gone s", "saved", "promises")
    layout = "{:>5} {:28}{:>5} {:5}{:>5}{:>8}{:>8}{:>7}  {}"
    print(layout.format(*head))
    for row in rows:
        found = [f"{row[name]:.1f}" if name in row else "-" for name in ("seconds", "gone")]
        broken = row["broken"].splitlines()[0] if row["broken"] else "kept, resumed equal"
        print(layout.format(row["seed"], row["fault"], row["step"], row["part"], f"{row['share']:.2f}", *found,
                            row.get("saved", "-"), broken))  # fmt: skip
    print(f"{sum(not row['broken'] for row in rows)} of {len(rows)} kept every promise")


def main(arguments: list[str] | None = None) -> int:
    """Run what the folder has not, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/faults"))
    given = parser.parse_args(arguments)
    folder = given.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    wanted = set(range(given.first, given.first + given.count)) - {row["seed"] for row in rows}
    if wanted:
        variables = clean_environment(**cpu.ENVIRONMENT, BOND_DEVICE="cpu", BOND_ACTIVE="1", OMP_NUM_THREADS="1")
        with Server(variables) as server, record.open("a") as file:
            trials = Trials(folder, server)
            for seed in sorted(wanted):
                rows.append(trials.run(seed))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                print(rows[-1] if rows[-1]["broken"] else f"{seed}: {rows[-1]['fault']}", file=sys.stderr, flush=True)
    table(rows)
    return int(any(row["broken"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
