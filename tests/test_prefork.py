"""Copies of one process that has the host's imports: they are what a fresh process would be, only sooner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, clean_environment

from bond_plugin.bench.runner import Processes
from bond_plugin.host import PYTHON_VARIABLE

pytestmark = pytest.mark.e2e  # the server takes half a minute to start


@pytest.fixture(scope="module")
def python(forks: dict[str, str]) -> str:
    if not forks:
        pytest.skip("only for machines without GPU")
    return forks[PYTHON_VARIABLE]


def run(python: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_command_line_environment_folder_and_status_are_those_asked_for(python: str, tmp_path: Path) -> None:
    code = (
        "import json, os, sys; print(json.dumps([sys.argv, os.environ['MINE'], os.getcwd(), 'vllm' in sys.modules]));"
        "print('said', file=sys.stderr); sys.exit(7)"
    )
    done = run(python, "-u", "-c", code, "a", "b c", cwd=tmp_path, env={"MINE": "x", "PATH": os.environ["PATH"]})
    assert done.returncode == 7
    assert json.loads(done.stdout) == [["-c", "a", "b c"], "x", str(tmp_path), True]
    assert done.stderr.strip() == "said"


def test_files_and_modules_run_as_main(python: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv[1:], __file__)\n")
    path = str(tmp_path / "mine.py")
    assert run(python, path, "1").stdout == f"['1'] {path}\n"
    assert run(python, "-m", "mine", "2", cwd=tmp_path).stdout == f"['2'] {path}\n"


def test_folders_of_pythonpath_are_looked_into(python: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("said = 7\n")
    done = run(python, "-c", "import mine; print(mine.said)", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "7\n", done.stderr


def test_what_a_copy_raises_is_said_and_is_status_one(python: str) -> None:
    done = run(python, "-c", "raise ValueError('this one')")
    assert done.returncode == 1
    assert "ValueError: this one" in done.stderr


def test_open_files_are_handed_over_under_their_numbers(python: str) -> None:
    reads, writes = os.pipe()
    try:
        done = run(python, "-c", f"import os; os.write({writes}, b'through the pipe')", pass_fds=(writes,))
        assert done.returncode == 0, done.stderr
        assert os.read(reads, 100) == b"through the pipe"
    finally:
        os.close(reads)
        os.close(writes)


def test_spawned_children_are_copies_too(python: str, forks: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def child(queue):\n"
        "    queue.put('vllm' in sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    queue = spawn.Queue()\n"
        "    process = spawn.Process(target=child, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=50))\n"
        "    process.join()\n"
        "    sys.exit(process.exitcode)\n"
    )
    done = run(python, str(script), env={**os.environ, **forks})
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


def test_random_numbers_differ_between_copies(python: str) -> None:
    code = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (run(python, "-c", code).stdout.split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_executable_ends_the_copy(python: str, number: int) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    waiting = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    copy = int(waiting.stdout.readline())
    assert copy != waiting.pid
    waiting.send_signal(number)
    assert waiting.wait(timeout=20) == -number
    waiting.stdout.close()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{copy}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{copy}")


def test_a_copy_that_is_killed_is_reported_as_killed(python: str) -> None:
    assert run(python, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL


def test_workers_of_another_job_of_ray_are_no_copies(python: str) -> None:
    code = "import sys; print('vllm' in sys.modules)"
    for job, copied in (("01000000", "True"), ("02000000", "False")):
        done = run(python, "-c", code, env={**os.environ, "RAY_JOB_ID": job})
        assert done.stdout.strip() == copied, done.stderr


def test_bench_counts_the_memory_of_copies(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is no child of the process that bench started, nor are its own children, as Ray's workers are."""
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    hold = "import time; x = bytearray(200 * 2**20); time.sleep(3)"
    code = f"import subprocess; subprocess.run([{python!r}, '-c', {hold!r}]); {hold}"
    peak = Processes().run("this", ["-c", code], tmp_path / "log", memory=True)
    assert peak is not None and 0.2 < peak < 2


def test_a_command_runs_beside_a_server_of_its_own() -> None:
    inner = "import sys; print('vllm' in sys.modules)"
    outer = (
        f"import os, subprocess, sys; subprocess.run([os.environ[{PYTHON_VARIABLE!r}], '-c', {inner!r}]); sys.exit(5)"
    )
    prefork = [sys.executable, str(REPOSITORY / "benchmarks" / "prefork.py")]
    done = subprocess.run(
        [*prefork, sys.executable, "-c", outer], env=clean_environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.stdout.strip(), done.returncode) == ("True", 5), done.stderr


def test_a_command_that_is_killed_has_a_shells_status() -> None:
    """Beside a server that imports nothing."""
    code = (
        f"import contextlib, sys, types; sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r}); import prefork;"
        "prefork.Server = lambda: contextlib.nullcontext(types.SimpleNamespace(python=sys.executable));"
        "sys.exit(prefork.main([sys.executable, '-c', 'import os; os.kill(os.getpid(), 15)']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
