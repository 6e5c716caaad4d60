"""Several vLLM engines beside each other, for the cache, bench and evaluate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import Run, Tiny, clean_environment, recipe_for, to_argv, with_flags

from bond_plugin.offline import engine, scoring

#: Speaks the protocol of an engine's process. The one with GPU 3 is slow; ``DIES`` names the GPU of one that dies.
CHILD = r"""
import json, os, sys, time
job, gpu = json.loads(sys.stdin.readline()), os.environ["CUDA_VISIBLE_DEVICES"]
for done, line in enumerate(sys.stdin, start=1):
    chunk = json.loads(line)
    if chunk is None:
        raise SystemExit
    if gpu == os.environ.get("DIES"):
        print("no memory", file=sys.stderr)
        os.kill(os.getpid(), 9)
    time.sleep(0.5 if gpu == "3" else 0.05)
    part = job["prompts"][chunk * job["chunk"] : (chunk + 1) * job["chunk"]]
    print(json.dumps({"done": done * job["chunk"]}), flush=True)
    samples = [{"prompt_ids": [], "response_ids": [], "queries": [text], "responses": [gpu]} for text in part]
    print(json.dumps({"chunk": chunk, "samples": samples}), flush=True)
time.sleep(60)
"""


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "child.py"}"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(engine, "python", lambda: str(interpreter))
    monkeypatch.setattr(engine, "gpus", lambda: ["3", "5", "8"])


def streamed(count: int, engines: int, **how: Any) -> Any:
    prompts = [str(i) for i in range(count)]
    given = {"chunk": 2, "max_new_tokens": 1, "temperature": 1.0, "seed": 0, **how}
    return engine.stream("somewhere", prompts, 1, engines=engines, **given)


@pytest.fixture(autouse=True)
def before() -> None:
    """Other tests' processes, of which copies are made (benchmarks/prefork.py)."""
    global _before
    _before = set(psutil.Process().children(recursive=True))


_before: set[psutil.Process] = set()


def left() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each not in _before]


def test_chunks_come_in_order_and_a_fast_engine_has_more_of_them(children: None) -> None:
    seen: list[tuple[int, int]] = []
    chunks = list(streamed(39, 3, progress=lambda done, total: seen.append((done, total))))
    assert [text for chunk in chunks for one in chunk for text in one.queries] == [str(i) for i in range(39)]
    assert [len(chunk) for chunk in chunks] == [2] * 19 + [1]
    by = [one.responses[0] for chunk in chunks for one in chunk]
    assert 0 < by.count("3") < by.count("5") and by.count("8")  # of its own each, the first first
    assert seen[-1] == (40, 39)  # the child counts whole chunks
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not left()


def test_what_is_not_used_yet_is_two_chunks_an_engine(children: None) -> None:
    seen: list[int] = []
    drawn = streamed(100, 2, progress=lambda done, _: seen.append(done))
    next(drawn)
    time.sleep(2)
    next(drawn)  # hears of all that was done
    time.sleep(1)
    next(drawn)
    assert seen[-1] <= 2 * (2 + 2 * 2)
    drawn.close()
    assert not left()


def test_no_engine_is_started_without_a_chunk(children: None) -> None:
    drawn = streamed(3, 3)
    next(drawn)
    assert len([one for one in left() if "child.py" in " ".join(one.cmdline())]) == 2
    drawn.close()
    assert list(streamed(0, 3)) == []


def test_samples_come_in_the_order_of_the_prompts(children: None) -> None:
    prompts = [str(i) for i in range(8)]
    drawn = engine.sample("somewhere", prompts, 1, engines=3, max_new_tokens=1, temperature=1.0, seed=0)
    assert [one.queries[0] for one in drawn] == prompts
    assert [one.responses[0] for one in drawn[:2]] == ["3", "5"]  # every third


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_dies_ends_all_with_the_cause(
    children: None, engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES", ["3", "5"][engines - 1])
    started = time.monotonic()
    which = "engine 2 of 2, " if engines == 2 else ""
    with pytest.raises(engine.SamplingError, match=rf"somewhere failed \({which}exit status -9\).*:\nno memory$"):
        list(streamed(40, engines))
    assert time.monotonic() - started < 5
    assert not left()


@pytest.mark.parametrize(
    ("there", "width", "asked", "count"),
    [(8, 1, None, 8), (8, 2, None, 4), (8, 3, 9, 2), (8, 1, 3, 3), (2, 4, None, 1), (0, 1, None, 1), (0, 2, 3, 3)],
)
def test_as_many_engines_as_asked_and_as_there_are_gpus_for(
    there: int, width: int, asked: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine.count(width, asked) == count
    assert engine.gpus() == [str(i) for i in range(there)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7")
    assert engine.gpus() == ["GPU-a", "GPU-b", "7"][:there]


def test_a_reward_model_has_its_place_where_an_engine_uses_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    score = object.__new__(scoring.ModelScore)
    score.device = torch.device("cuda", 3)
    assert scoring.room_beside(score, 3) == {}
    assert scoring.room_beside(score, 4) == {"gpu_memory_utilization": 0.65}
    assert scoring.room_beside(SimpleNamespace(), 4) == {}


@pytest.mark.parametrize("slow", [False, True])
def test_what_a_training_samples_with_is_taken_from_its_flags(slow: bool) -> None:
    args = SimpleNamespace(
        rollout=SimpleNamespace(max_new_tokens=7, temperature=0.5),
        data=SimpleNamespace(max_len=19, disable_fast_tokenizer=slow),
    )
    how = {"max_new_tokens": 7, "max_len": 19, "temperature": 0.5, "use_fast_tokenizer": not slow}
    assert scoring.sampling(args, SimpleNamespace(), 3, 2) == {
        **how, "engines": 3, "tensor_parallel_size": 2, "engine": {},
    }  # fmt: skip


def test_a_prompt_that_is_there_again_has_other_seeds() -> None:
    first, other, again = engine._seeds(0, ["a", "b", "a"], 4)
    assert len({*first, *other, *again}) == 12
    assert engine._seeds(0, ["b", "a"], 4) == [other, first]  # whatever else is asked for


# Real vLLM.


def engines_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if engine.__name__ in " ".join(one.cmdline())]


@pytest.mark.e2e
def test_two_engines_write_the_file_of_one_also_after_one_of_them_was_killed(
    tiny: Tiny, bond_command: Callable[..., Run], tmp_path: Path
) -> None:
    slow = tmp_path / "reward.py"  # so that there is a middle
    slow.write_text(
        tiny.reward.read_text().replace(
            "rewards = []", 'rewards = []; import os, time; time.sleep(float(os.environ.get("DELAY", 0)))'
        )
    )

    def command(output: Path, engines: int) -> list[str]:
        flags = {"algo.advantage.estimator": "bond", "reward.remote_url": slow, "vllm.num_engines": engines}
        cached = {"cache.output": output, "cache.samples": 24, "cache.chunk": 48, "cache.log_probs": True}
        wanted = with_flags(recipe_for(tiny), {**flags, **cached})
        return ["cache", *to_argv(wanted)]

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    bond_command(tmp_path / "one", *command(one, 1))

    with (tmp_path / "killed.log").open("w") as log:
        environment = clean_environment(DELAY="0.02", OMP_NUM_THREADS="1")
        asked = [sys.executable, "-m", "bond_plugin", *command(two, 2)]  # whose engines are its children
        killed = subprocess.Popen(asked, env=environment, stdout=log, stderr=log)
        said = lambda: (tmp_path / "killed.log").read_text()  # noqa: E731
        deadline = time.monotonic() + 300
        while not two.exists() or two.read_bytes().count(b"\n") < 6:
            assert killed.poll() is None and time.monotonic() < deadline, said()[-3000:]
            time.sleep(0.02)
        family = psutil.Process(killed.pid).children(recursive=True)
        victim = engines_of(killed)[1]
        assert len(engines_of(killed)) == 2
        os.kill(victim.pid, signal.SIGKILL)
        started = time.monotonic()
        assert killed.wait(60) == 1, said()[-3000:]
    assert time.monotonic() - started < 15
    assert "engine 2 of 2, exit status -9" in said()
    assert ", by 2 engines" in said()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive

    before = two.read_bytes()
    assert 6 <= before.count(b"\n") < 27
    done = bond_command(tmp_path / "two", *command(two, 2))
    assert "prompts are there already" in done.output
    assert two.read_bytes().startswith(before)
    assert two.read_bytes() == one.read_bytes()  # to the last bit of the log-probabilities


@pytest.mark.e2e
def test_a_parent_that_is_killed_takes_its_engines_with_it(tiny: Tiny, tmp_path: Path) -> None:
    code = (
        "import sys; from bond_plugin.offline import engine\n"
        "how = dict(max_new_tokens=10, temperature=1.0, seed=0, max_len=32)\n"
        "for _ in engine.stream(sys.argv[1], list('abcdefgh'), 8, chunk=2, engines=2, **how):\n"
        "    print('chunk', flush=True)"
    )
    environment = clean_environment(PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    for wait in (False, True):  # while they start, and while they sample
        arguments = [sys.executable, "-c", code, str(tiny.model)]
        with (tmp_path / "log").open("w") as log:
            parent = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=log)
            if wait:
                assert parent.stdout.readline() == b"chunk\n", (tmp_path / "log").read_text()[-3000:]
            while len(engines_of(parent)) < 2:
                time.sleep(0.05)
            family = psutil.Process(parent.pid).children(recursive=True)
            parent.kill()
            parent.communicate()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
