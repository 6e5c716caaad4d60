"""A run of real processes that is watched, and may be killed, while it trains."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from conftest import Tiny, clean_environment, python_of, recipe_for, to_argv, with_flags

#: Seconds within which a run ends after a fault.
SOON = 60
#: Seconds within which its last process has gone: Ray's agent of a node looks for the node's end once a minute.
GONE = 90


def role(command: str) -> str:
    """What a process of a run is for, from its command line."""
    if command.startswith("ray::"):
        return re.match(r"\w+", command.removeprefix("ray::"))[0]
    if "bond_plugin train" in command:
        return "driver"
    return re.sub(r".*/", "", command.split(" --")[0].split()[-1]) if command else "(ended)"


@dataclass(frozen=True)
class Fault:
    """A signal to one process of a run, and how the run must end: its status, and a pattern in its output."""

    victim: str
    number: signal.Signals
    status: int
    says: str

    def __str__(self) -> str:
        return f"{self.number.name} {self.victim}"

    def flags(self, tiny: Tiny) -> dict[str, Any]:
        """Of a run that has such a process, saves every second step, and samples what it would if resumed."""
        reward = {"reward.remote_url": None, "reward.model_name_or_path": str(tiny.model)}
        return {
            "actor.adam.lr": 1e-4,  # so small that the last bits of a sum do not change which tokens are sampled
            "ckpt.max_num": 1,
            "ckpt.save_steps": 2,
            "train.num_episodes": 5,  # of three steps
            **(reward if self.victim == "RewardModelActor" else {}),
        }


def _actor(name: str) -> Fault:
    return Fault(name, signal.SIGKILL, 1, rf"class_name: {name}\b|bond: error: {name} \(process")  # Ray's words, ours


#: The first five are a light suite's.
FAULTS = (
    Fault("driver", signal.SIGTERM, 143, "bond: stopped by SIGTERM"),
    Fault("driver", signal.SIGINT, 130, "bond: stopped by SIGINT"),
    Fault("driver", signal.SIGKILL, -signal.SIGKILL, ""),
    Fault("VLLM::EngineCore", signal.SIGKILL, 1, "EngineDeadError"),
    _actor("PolicyModelActor"),
    _actor("RolloutRayActor"),
    _actor("RewardModelActor"),
    _actor("PPOTrainer"),
    Fault("raylet", signal.SIGKILL, 1, "[Rr]aylet"),
)


@dataclass(frozen=True)
class Moment:
    """When a fault comes: after ``step`` steps, then ``share`` (0 to 1) of the way through a part of the next."""

    step: int
    part: str  # "step", "sync" (of weights) or "save"
    share: float

    def wait(self, run: Running) -> None:
        run.wait_for(lambda: run.steps >= self.step, 300, f"step {self.step} was not made")
        if self.part == "save":  # a folder that is not yet the latest
            run.wait_for(lambda: self._saving(run), 60, "no checkpoint was begun", every=0.001)
            time.sleep(self.share * 0.05)
            return
        last = run.metrics[-1]
        total, sync = last["timing/step_total"], last["timing/broadcast"]
        wanted = self.share * total if self.part == "step" else total - (1 - self.share) * sync
        time.sleep(max(0.0, last["time"] + wanted - time.time()))

    @staticmethod
    def _saving(run: Running) -> bool:
        latest = run.checkpoints / "latest"
        named = latest.read_text() if latest.exists() else ""
        return any(path.name > named for path in run.checkpoints.glob("global_step?"))


def draw(seed: int) -> tuple[Fault, Moment]:
    """Seeds in a row go through all faults; the moment is random."""
    source = random.Random(seed)
    return FAULTS[seed % len(FAULTS)], Moment(
        source.randint(2, 6), source.choice(("step", "sync", "save")), source.random()
    )


@dataclass(frozen=True)
class Ended:
    """How a run ended after a fault: in how many seconds, when its last process had gone, and what it had saved."""

    seconds: float
    gone: float
    made: int  # steps
    saved: int  # the step of its last checkpoint


def strike(run: Running, fault: Fault, moment: Moment) -> Ended:
    """Wait for the moment, send the signal, and hold the run to what it promises. Raises AssertionError."""
    run.wait_for(lambda: run.steps > 0, 600, "no step was made")
    shared, victim = run.shared_memory(), run.find(fault.victim)
    moment.wait(run)
    os.kill(victim, fault.number)
    seconds = run.wait_for(lambda: run.process.poll() is not None, SOON, "the run does not end")
    assert run.process.returncode == fault.status, f"status {run.process.returncode}:\n{run.output[-5000:]}"
    assert re.search(fault.says, run.output), f"no {fault.says!r} in:\n{run.output[-5000:]}"
    gone = seconds + run.wait_for(lambda: not run.processes(), GONE, "processes are left")
    left = [str(path) for path in shared if path.exists()]
    assert not left, f"shared memory is left: {left}"
    made, saved = run.steps, run.saved()
    # A step's line is written, then it is saved; so the one before the last line's is whole.
    assert saved >= (made - 1) // 2 * 2, f"{made} steps were made, and {saved or 'nothing'} is saved"
    return Ended(seconds, gone, made, saved)


class Running:
    """``bond train`` on the tiny model, in the background, with ``flags`` over those of ``recipe_for``.

    All its processes are found by a variable in their environment. Leaving the context kills what is left. With
    ``forks`` (the fixture of that name) they are executables that wait for copies, and end with them: what is sent to
    one is handed on to its copy.
    """

    def __init__(
        self, tiny: Tiny, folder: Path, flags: dict[str, Any], forks: dict[str, str] | None = None, **environment: str
    ) -> None:
        self.mark, self.folder, self.started = uuid.uuid4().hex, folder, time.time()
        folders = {"ckpt.output_dir": str(folder / "out"), "ckpt.path": str(folder / "ckpt")}
        argv = to_argv(with_flags(recipe_for(tiny), folders | flags))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python_of(forks or {}), "-m", "bond_plugin", "train", *argv],
                cwd=folder,
                env=clean_environment(
                    **{"OMP_NUM_THREADS": "1", "BOND_TEST_MARK": self.mark, **(forks or {}), **environment}
                ),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *reason: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def processes(self) -> dict[int, str]:
        """Those that run, by their command lines."""
        found = {}
        for pid in psutil.pids():
            with suppress(OSError):
                entry = Path("/proc", str(pid))
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def find(self, name: str) -> int:
        """The only process of a :func:`role`."""
        (pid,) = [pid for pid, command in self.processes().items() if role(command) == name]
        return pid

    def wait_for(self, done: Callable[[], bool], seconds: float, what: str, every: float = 0.2) -> float:
        """Returns after how many seconds ``done()``; an AssertionError says ``what`` did not happen in time."""
        started = time.monotonic()
        while not done():
            assert time.monotonic() - started < seconds, f"{what}:\n{self.processes()}\n{self.output[-5000:]}"
            time.sleep(every)
        return time.monotonic() - started

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines so far."""
        path = self.folder / "out" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    @property
    def steps(self) -> int:
        return len(self.metrics)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "ckpt" / "_actor"

    def saved(self) -> int:
        """The step of the checkpoint from which it would resume, 0 if there is none. Fails if that is not whole."""
        latest = self.checkpoints / "latest"
        if not latest.exists():
            return 0
        folder = self.checkpoints / latest.read_text()
        assert (folder / "mp_rank_00_model_states.pt").is_file(), f"{latest} names {folder.name}"
        return int(folder.name.removeprefix("global_step"))

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that its processes have open or mapped, or that are named for one of them."""
        pids = self.processes()
        found = {str(path) for path in Path("/dev/shm").iterdir() if {*map(str, pids)} & {*path.name.split("-")}}
        for pid in pids:
            with suppress(psutil.Error, OSError):
                found |= {part.path for part in psutil.Process(pid).memory_maps(grouped=False)}
                found |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        here = {path for name in found if name.startswith("/dev/shm/") and (path := Path(name)).exists()}
        return {path for path in here if path.stat().st_mtime > self.started}  # another's process had the number too

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")
