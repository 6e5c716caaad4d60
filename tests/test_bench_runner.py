"""What the runner makes of logs and metrics, and that two of them do not write one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bond_plugin.bench import runner
from bond_plugin.bench.matrix import Cell, Matrix, Measuring
from bond_plugin.cli.main import main

LOG = """\
\x1b[36m(PPOTrainer pid=12)\x1b[0m Episode [1/1]:   0%|          | 0/48
Traceback (most recent call last):
  File "train.py", line 3, in <module>
ray.exceptions.RayTaskError(EngineGapError): ray::PPOTrainer.fit() (pid=12, ip=1)
    raise EngineGapError(
bond_plugin.host.experience.EngineGapError: the gap is 3
\x1b[36m(RolloutRayActor pid=13)\x1b[0m INFO shutdown
"""


def test_the_error_of_a_log_is_our_own_message_else_its_exception_else_its_last_lines() -> None:
    own = "bond: error: this run cannot start:\n  - first\n  - second"
    assert runner._error(f"note\n{own}\n") == own
    assert runner._error("usage: x\nbond train: error: unknown flag --x\n") == "bond train: error: unknown flag --x"
    assert runner._error(LOG) == "bond_plugin.host.experience.EngineGapError: the gap is 3"
    lines = [f"line {i}" for i in range(100)]
    assert runner._error("\n".join(lines)).splitlines() == lines[-12:]


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_count_tokens_and_take_kl_of_whole_responses(tmp_path: Path) -> None:
    ours = write(
        tmp_path / "ours.jsonl",
        {"step": 1, "rollout/generated_tokens": 10, "reward/policy": 1.0, "bond/kl_ref": 0.5, "kl": 9.0},
        {"step": 2, "rollout/generated_tokens": 20, "reward/policy": 2.0, "bond/kl_ref": 0.75},
    )
    found = runner._training(ours)
    assert (found["steps"], found["generated_tokens"]) == (2, 30)
    assert found["curve"] == {
        "generated_tokens": [10, 30], "reward": [1.0, 2.0], "kl": [0.5, 0.75], "log_quantile": [None, None],
    }  # fmt: skip
    host = write(tmp_path / "host.jsonl", {"step": 1, "reward": 3.0, "kl": 0.1, "response_length": 8.0})
    assert runner._training(host)["curve"]["kl"] == [0.8]  # the host's is a mean over tokens
    with pytest.raises(runner.BenchError, match="logged no step"):
        runner._training(write(tmp_path / "none.jsonl"))


def test_a_result_counts_for_the_flags_seed_files_and_reference_it_was_made_with(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"input": "a"}\n')
    cell = Cell("jbond", "J-BOND", {}, 1, {"data.prompt_dataset": str(data), "bond.eta": 0.1}, {})
    matrix = Matrix("", Measuring(prompts="x"), (cell,))

    def started() -> runner.Runner:
        return runner.Runner(matrix, tmp_path, [], print)

    def finished(cell: Cell, reference: str = "first") -> dict | None:
        return started().finished(cell, reference)

    made = started()
    folder = tmp_path / "cells" / cell.folder
    folder.mkdir(parents=True)
    result = {"key": made._key(cell, "first"), "status": "done", "label": "old"}
    (folder / "result.json").write_text(json.dumps(result))
    assert finished(cell)["label"] == "J-BOND"
    assert finished(cell, "second") is None
    other = replace(cell, flags={**cell.flags, "bond.eta": 0.2})
    assert other.folder == cell.folder and finished(other) is None
    data.write_text('{"input": "b"}\n')
    assert finished(cell) is None  # other prompts under the same name
    data.write_text('{"input": "a"}\n')
    assert finished(cell) is not None
    long = replace(cell, flags={**cell.flags, "data.input_template": "{}" + "x" * 5000, "reward.remote_url": ""})
    assert finished(long) is None
    (folder / "result.json").write_text(json.dumps({**result, "status": "failed"}))
    assert finished(cell) is None
    # Of another seed, were it in the same folder.
    assert made._key(cell, "first") != made._key(replace(cell, seed=2), "first")


def test_the_reference_is_measured_anew_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("one")
    matrix = Matrix("", Measuring(prompts="x"), ())

    def key(matrix: Matrix = matrix, prompt: str = "a", label: str = "", length: int = 8, chat: bool = False) -> str:
        configuration = {
            "actor": {"model_name_or_path": str(tmp_path)},
            "reward": {"remote_url": [str(reward)]},
            "rollout": {"max_new_tokens": length},
            "data": {"apply_chat_template": chat, "input_template": None},
        }
        rows = [{"input": prompt, "label": label}]
        return runner.Runner(matrix, tmp_path, rows, print)._reference_key(configuration)

    first = key()
    assert key(replace(matrix, title="another")) == first
    more = replace(matrix, evaluation=Measuring(prompts="x", samples=17))
    labelled = replace(matrix, evaluation=Measuring(prompts="x", label_key="answer"))
    others = [key(more), key(prompt="b"), key(labelled, label="1"), key(labelled, label="2"), key(length=9)]
    others.append(key(chat=True))
    reward.write_text("two")
    others.append(key())
    reward.write_text("one")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    others.append(key())
    assert len({first, *others}) == 9


def test_runs_beside_each_other_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cells = [Cell("a", "", {}, seed, {}, {}) for seed in (1, 2)]
    made = runner.Runner(Matrix("", Measuring(prompts="x"), ()), tmp_path, [], print)
    made.configurations = {
        one.name: {"bond": {"device": "cuda"}, "gpu_slots": {"actor": 1, "vllm": 1}} for one in cells
    }
    monkeypatch.setattr(runner, "_gpus", lambda: 5)
    pairs = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert made.slots() == pairs
    made.parallel = 4  # more than there are GPUs for: whatever is left
    assert made.slots() == [*pairs, {"CUDA_VISIBLE_DEVICES": "4"}, {}]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    made.parallel = 0
    assert made.slots() == [{}, {}]


def test_a_cell_that_was_stopped_has_not_failed(tmp_path: Path) -> None:
    cell = Cell("a", "", {}, 1, {}, {})
    made = runner.Runner(Matrix("", Measuring(prompts="x"), ()), tmp_path, [], print)
    made.configurations = {cell.name: {"bond": {"device": "cpu"}}}
    made.free.put({})
    made.processes.stopped.set()
    with pytest.raises(runner.BenchError):
        made.cell(cell, "reference")
    assert not list(tmp_path.rglob("result.json"))


def test_two_runners_do_not_write_one_folder(tmp_path: Path) -> None:
    prompts = write(tmp_path / "held.jsonl", {"input": "a"})
    matrix = Matrix("", Measuring(prompts=str(prompts)), (Cell("a", "", {}, 1, {}, {}),))
    held = pytest.raises(runner.BenchError, match=f"process {os.getpid()} on .* writes to")
    with runner.opened(matrix, tmp_path, print), held:
        runner.opened(matrix, tmp_path, print).__enter__()
    with runner.opened(matrix, tmp_path, print):
        pass


def test_processes_report_status_log_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MEMORY_EVERY", 0.1)  # and not once, which may be too early on a busy machine
    processes, log = runner.Processes(), tmp_path / "log"
    code = "import os, time; x = bytearray(200 * 2**20); print(os.environ['MINE']); time.sleep(3)"
    peak = processes.run("this", ["-c", code], log, {"MINE": "here"}, memory=True)
    assert log.read_text() == "here\n"
    assert peak == pytest.approx(0.2, abs=0.03)
    with pytest.raises(runner.BenchError, match="this ended with status 5: only this"):
        processes.run("this", ["-c", "print('only this'); raise SystemExit(5)"], log)


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    processes = runner.Processes()
    threading.Timer(1.0, processes.stopped.set).start()
    started = time.monotonic()
    with pytest.raises(runner.BenchError, match="ended with status -15"):
        processes.run("this", ["-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert time.monotonic() - started < 20
    with pytest.raises(runner.BenchError, match="stopped"):
        processes.run("this", ["-c", "pass"], tmp_path / "log")


def test_help_teaches_the_file_and_answers_at_once() -> None:
    code = (
        "import sys; from bond_plugin.cli.main import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n"
    )
    probe = code + "assert not {'torch', 'ray', 'vllm', 'openrlhf'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("strength:", "--check", "RAY_ADDRESS", "report.html"):
        assert word in done.stdout


SMALL = "common: {}\nevaluation: {prompts: none.jsonl}\nmethods: {a: {}}"


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("methods: {}", [], "'common' is missing"),
        (SMALL, ["--only", "b"], "--only b: the file has a"),
        (SMALL, [], "none.jsonl: no such file"),
        (SMALL, ["--report"], "reference.json: no such file"),
    ],
)
def test_an_unusable_matrix_is_an_error_before_anything_starts(
    text: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    assert main(["bench", str(path), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_time_left_is_not_fooled_by_cells_that_were_resumed_or_failed() -> None:
    done = {"status": "done", "training": {"seconds": 160.0}}
    failed = {"status": "failed", "training": None}
    assert runner._pace(400.0, 2, 1, [done, done, None]) == 200.0
    assert runner._pace(20.0, 2, 1, [done, failed, None]) == 160.0  # one had only to be measured, one failed at once
    assert runner._pace(20.0, 2, 2, [done, failed, None]) == 80.0
    assert runner._pace(20.0, 2, 1, [failed, failed]) == 10.0
