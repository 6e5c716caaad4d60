"""Errors of the system name the file that they are about, whichever command meets them, and take nothing away."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import clean_environment

from bond_plugin import files
from bond_plugin.cli.main import main
from bond_plugin.host.metrics import MetricsFile
from bond_plugin.offline import reward_cache


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: what a full disk does, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, [1])
    with room_for(100), pytest.raises(OSError, match="File too large") as caught:
        files.write_json(path, "y" * 1000)
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["x.json"] and json.loads(path.read_text()) == [1]
    with pytest.raises(FileNotFoundError) as caught:
        files.write_json(tmp_path / "none" / "x.json", 1)
    assert caught.value.filename == str(tmp_path / "none" / "x.json")


def test_metrics_and_caches_name_themselves(tmp_path: Path) -> None:
    file = MetricsFile(SimpleNamespace(ckpt=SimpleNamespace(output_dir=str(tmp_path))))
    file.write(1, {"reward": 1.0})
    with room_for(file.path.stat().st_size), pytest.raises(OSError) as caught:
        file.write(2, {"reward": 1.0})
    assert caught.value.filename == str(file.path)
    path = tmp_path / "r.jsonl"
    with reward_cache.Writer(path, {"samples": 2}) as writer:
        with room_for(path.stat().st_size), pytest.raises(OSError) as caught:
            writer.append("a", [1.0, 2.0])
        assert caught.value.filename == str(path)


def test_a_command_that_cannot_write_says_which_file_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["lab", "--algorithm", "jbond", "--steps", "1", "--output-dir", str(tmp_path / "out")]
    with room_for(100):
        assert main(argv) == 1
    assert capsys.readouterr().err == f"bond lab: error: {tmp_path / 'out' / 'lab.json'}: File too large\n"


@pytest.mark.parametrize("argv", [["recipes"], ["--help"]])
def test_a_standard_output_without_room_is_named(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bond_plugin", *argv]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert done.returncode == 1
    assert done.stderr.endswith("error: the standard output: No space left on device\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m bond_plugin recipes | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "file: a file is where the folder should be"),
        ("file/in/it", "file: a file is where the folder should be"),
        ("gone/in/it", "gone: a link that leads nowhere is where the folder should be"),
        ("x" * 300, f"{'x' * 300}: nothing can be written into this folder: File name too long"),
        ("", "'' is no name of a folder"),
        ("a\0b", "'a\\x00b' is no name of a folder"),
        ("/proc/new", "/proc: nothing can be written into this folder"),
        ("/dev/null", "/dev/null: a file is where the folder should be"),
        ("new/in/it", None),
        ("linked", None),
    ],
)
def test_folders_that_cannot_be_written(
    name: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("gone").symlink_to("/nowhere/at/all")
    Path("linked").symlink_to(tmp_path)
    before = sorted(os.listdir())
    assert files.unwritable(name) == says
    assert sorted(os.listdir()) == before


def test_pipes_and_devices_are_not_read(tmp_path: Path, dry: Any) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        with pytest.raises(OSError, match="not an ordinary file"):
            files.open_file(path)
    found = dry({"data.prompt_dataset": str(tmp_path / "pipe.jsonl")})
    assert found.status == 2 and "pipe.jsonl: not an ordinary file" in found.text


def test_a_file_of_the_dry_run_that_cannot_be_written(dry: Any, tmp_path: Path) -> None:
    path = tmp_path / "none" / "run.json"
    found = dry(extra=("--json", str(path)))
    assert found.status == 1 and f"bond train: error: {path}: no such file" in found.text
