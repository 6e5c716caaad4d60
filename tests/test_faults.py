"""Processes of a run are killed or told to stop: it ends soon, says why, and leaves nothing behind.

More of it: ``make faults``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import POOLED, SAME, Run, Tiny, goes_on_as
from running import GONE, SOON, Running, draw, strike


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(5))
def test_a_killed_process_ends_the_run_and_leaves_nothing(tiny: Tiny, tmp_path: Path, seed: int) -> None:
    fault, moment = draw(seed)
    print(f"{fault}, {moment}")
    with Running(tiny, tmp_path, fault.flags(tiny)) as run:
        print(strike(run, fault, moment))


@contextmanager
def training(tiny: Tiny, folder: Path, flags: dict[str, Any], forks: dict[str, str]) -> Iterator[Running]:
    """A run that saves when it is stopped, and has made three steps."""
    with Running(tiny, folder, {"ckpt.save_on_stop": True, "ckpt.save_steps": -1, **flags}, forks) as run:
        run.wait_for(lambda: run.steps >= 3, 300, "no three steps were made")
        yield run


def ended(run: Running, status: int) -> None:
    run.wait_for(lambda: run.process.poll() is not None, SOON, "the run does not end")
    assert run.process.returncode == status, run.output[-5000:]
    run.wait_for(lambda: not run.processes(), GONE, "processes are left")


def saved_step(run: Running) -> int:
    """The last step of the metrics, after which the run was saved."""
    assert run.saved() == run.steps
    assert f"bond: saved global_step{run.steps}: --ckpt.load_enable goes on from it" in run.output
    return run.steps


@pytest.mark.e2e
def test_saved_on_stop_and_resumed_as_if_undisturbed(
    tiny: Tiny, bond: Callable[..., Run], trained: Run, forks: dict[str, str], tmp_path: Path
) -> None:
    """Algorithm 2, whose samples a resumed run draws again; twelve steps."""
    flags = {**SAME, "train.num_episodes": 4}
    with training(tiny, tmp_path, flags, forks) as run:
        os.kill(run.find("driver"), signal.SIGTERM)
        ended(run, 143)
        step = saved_step(run)
        assert "bond: SIGTERM: the step that runs is finished and a checkpoint is saved" in run.output
        assert "bond: stopped by SIGTERM" in run.output
    assert 3 <= step < 12
    resumed = bond(tmp_path, {**flags, "ckpt.load_enable": True})
    assert [one["step"] for one in resumed.metrics] == list(range(1, 13))
    goes_on_as(resumed.metrics, trained.metrics[:12])


@pytest.mark.e2e
def test_ctrl_c_saves_an_asynchronous_run(tiny: Tiny, forks: dict[str, str], tmp_path: Path) -> None:
    """Which a terminal sends to every process of the group."""
    flags = {**POOLED, "train.async_enable": True, "train.num_episodes": 1000}
    with training(tiny, tmp_path, flags, forks) as run:
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
def test_a_second_signal_ends_at_once(tiny: Tiny, forks: dict[str, str], tmp_path: Path) -> None:
    wait, reward = tmp_path / "wait", tmp_path / "reward.py"
    reward.write_text(SLOW.format(wait=str(wait)))
    flags = {**POOLED, "reward.remote_url": str(reward), "train.num_episodes": 1000}
    with training(tiny, tmp_path, flags, forks) as run:
        wait.touch()  # from here on no step ends
        command = run.find("driver")
        time.sleep(2)
        os.kill(command, signal.SIGINT)
        run.wait_for(lambda: "a second signal ends it at once" in run.output, 5, "no line")
        time.sleep(2)
        assert run.process.poll() is None
        os.kill(command, signal.SIGTERM)
        ended(run, 143)
        assert "bond: saved" not in run.output
        assert not (tmp_path / "ckpt" / "_actor").exists()
