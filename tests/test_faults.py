"""Processes of a run are killed: it ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import POOLED, Run, Tiny, clean_environment, recipe_for, to_argv, with_flags

#: Seconds within which a run ends after a fault.
SOON = 60


class Running:
    """A run of many steps. All its processes are found by a variable in their environment."""

    def __init__(self, tiny: Tiny, folder: Path, more: dict[str, Any]) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        flags = {
            "train.num_episodes": 1000,
            "ckpt.save_steps": 2,
            "ckpt.max_num": 1,
            "ckpt.output_dir": str(folder / "out"),
            "ckpt.path": str(folder / "ckpt"),
        }
        argv = to_argv(with_flags(recipe_for(tiny), {**flags, **more}))
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


@contextmanager
def training(tiny: Tiny, folder: Path, more: dict[str, Any]) -> Iterator[Running]:
    """A run that has made three steps; nothing of it is left afterwards."""
    run = Running(tiny, folder, more)
    metrics = folder / "out" / "metrics.jsonl"
    try:
        run.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 300, "no step was made")
        yield run
    finally:
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


@pytest.fixture
def running(tiny: Tiny, tmp_path: Path) -> Iterator[Running]:
    with training(tiny, tmp_path, POOLED) as run:
        yield run


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


def ended(run: Running, status: int) -> None:
    run.wait_for(lambda: run.process.poll() is not None, SOON, "the run does not end")
    assert run.process.returncode == status, run.output[-5000:]
    run.wait_for(lambda: not run.processes(), 90, "processes are left")


def saved_step(run: Running) -> int:
    """The last step of the metrics, after which the run was saved."""
    step = len((run.folder / "out" / "metrics.jsonl").read_text().splitlines())
    tag = (run.folder / "ckpt" / "_actor" / "latest").read_text()
    assert tag == f"global_step{step}"
    assert f"bond: saved {tag}: --ckpt.load_enable goes on from it" in run.output
    return step


@pytest.mark.e2e
def test_saved_on_stop_and_resumed_as_if_undisturbed(tiny: Tiny, bond: Callable[..., Run], tmp_path: Path) -> None:
    """Algorithm 2, whose samples a resumed run draws again; twelve steps."""
    flags = {"data.max_samples": 48, "bond.eta": 0.1, "train.num_episodes": 4, "ckpt.save_steps": -1}
    with training(tiny, tmp_path, {**flags, "ckpt.save_on_stop": True}) as run:
        os.kill(run.find("bond_plugin train"), signal.SIGTERM)
        ended(run, 143)
        step = saved_step(run)
        assert "bond: SIGTERM: the step that runs is finished and a checkpoint is saved" in run.output
        assert "bond: stopped by SIGTERM" in run.output
    assert 3 <= step < 12
    resumed = bond(tmp_path, {**flags, "ckpt.load_enable": True})
    undisturbed = bond(tmp_path / "undisturbed", flags)
    assert [one["step"] for one in resumed.metrics] == list(range(1, 13))
    for mine, theirs in zip(resumed.metrics, undisturbed.metrics, strict=True):
        for name in ("reward/policy", "reward/anchor", "bond/loss", "bond/kl_anchor", "bond/anchor_distance",
                     "actor_grad_norm", "bond/kl_ref", "bond/win_rate"):  # fmt: skip
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (mine["step"], name)


@pytest.mark.e2e
def test_ctrl_c_saves_an_asynchronous_run(tiny: Tiny, tmp_path: Path) -> None:
    """Which a terminal sends to every process of the group."""
    flags = {**POOLED, "train.async_enable": True, "ckpt.save_on_stop": True, "ckpt.save_steps": -1}
    with training(tiny, tmp_path, flags) as run:
        os.killpg(run.process.pid, signal.SIGINT)
        ended(run, 130)
        saved_step(run)


SLOW = """
import os
import time

import torch


def reward_func(queries, prompts, labels):
    while os.path.exists({wait!r}):
        time.sleep(0.1)
    return {{"rewards": torch.rand(len(queries)), "scores": torch.zeros(len(queries))}}
"""


@pytest.mark.e2e
def test_a_second_signal_ends_at_once(tiny: Tiny, tmp_path: Path) -> None:
    wait, reward = tmp_path / "wait", tmp_path / "reward.py"
    reward.write_text(SLOW.format(wait=str(wait)))
    flags = {**POOLED, "reward.remote_url": str(reward), "ckpt.save_on_stop": True, "ckpt.save_steps": -1}
    with training(tiny, tmp_path, flags) as run:
        wait.touch()  # from here on no step ends
        command = run.find("bond_plugin train")
        time.sleep(2)
        os.kill(command, signal.SIGINT)
        run.wait_for(lambda: "a second signal ends it at once" in run.output, 5, "no line")
        time.sleep(2)
        assert run.process.poll() is None
        os.kill(command, signal.SIGTERM)
        ended(run, 143)
        assert "bond: saved" not in run.output
        assert not (tmp_path / "ckpt" / "_actor").exists()
