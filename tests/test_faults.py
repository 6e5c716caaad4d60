"""Processes of a run are killed: it ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import POOLED, Tiny, clean_environment, recipe_for, to_argv, with_flags

#: Seconds within which a run ends after a fault.
SOON = 60


class Running:
    """A run of many steps. All its processes are found by a variable in their environment."""

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        flags = {
            "train.num_episodes": 1000,
            "ckpt.save_steps": 2,
            "ckpt.max_num": 1,
            "ckpt.output_dir": str(folder / "out"),
            "ckpt.path": str(folder / "ckpt"),
        }
        argv = to_argv(with_flags(recipe_for(tiny), {**POOLED, **flags}))
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bond_plugin", "train", *argv],
                cwd=folder,
                env=clean_environment(OMP_NUM_THREADS="1", BOND_TEST_MARK=self.mark),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """Those that run, by their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def find(self, name: str) -> int:
        (pid,) = [pid for pid, command in self.processes().items() if name in command]
        return pid

    def wait_for(self, done: Callable[[], bool], seconds: float, what: str) -> float:
        started = time.monotonic()
        while not done():
            assert time.monotonic() - started < seconds, f"{what}:\n{self.processes()}\n{self.output[-5000:]}"
            time.sleep(0.2)
        return time.monotonic() - started

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def running(tiny: Tiny, tmp_path: Path) -> Iterator[Running]:
    run = Running(tiny, tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    try:
        run.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 300, "no step was made")
        yield run
    finally:
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("victim", "number", "status", "says"),
    [
        ("bond_plugin train", signal.SIGTERM, 143, "bond: stopped by SIGTERM"),
        ("bond_plugin train", signal.SIGINT, 130, "bond: stopped by SIGINT"),
        ("bond_plugin train", signal.SIGKILL, -signal.SIGKILL, ""),
        ("EngineCore", signal.SIGKILL, 1, "EngineDeadError"),
        ("PolicyModelActor", signal.SIGKILL, 1, "ActorDiedError"),
    ],
)
def test_a_killed_process_ends_the_run_and_leaves_nothing(
    running: Running, victim: str, number: int, status: int, says: str
) -> None:
    os.kill(running.find(victim), number)
    running.wait_for(lambda: running.process.poll() is not None, SOON, "the run does not end")
    assert running.process.returncode == status, running.output[-5000:]
    assert says in running.output
    # Ray's own agent of a node looks after the process that started it once a minute.
    running.wait_for(lambda: not running.processes(), 90, "processes are left")
    latest = running.folder / "ckpt" / "_actor" / "latest"
    assert (latest.parent / latest.read_text() / "mp_rank_00_model_states.pt").is_file()
