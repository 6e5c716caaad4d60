"""A disk that is really full: a file system of a few pages, which only root can mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import POOLED, Run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system"),
]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_checkpoints(bond: Callable[..., Run], tmp_path: Path) -> None:
    """A checkpoint takes about 1.5 MB here."""
    with small_disk(tmp_path / "disk", "80m") as disk:
        other = disk / "of-another"
        with other.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 74 * 2**20)
        flags = {**POOLED, "ckpt.path": str(disk / "ckpt"), "ckpt.save_steps": 1, "ckpt.max_num": 100,
                 "train.num_episodes": 3}  # fmt: skip
        stopped = bond(tmp_path, flags, check=False)
        made = len(stopped.metrics)
        assert stopped.status == 1, stopped.said
        assert f"{disk / 'ckpt' / '_actor' / f'global_step{made}'}: No space left on device" in stopped.output
        assert (disk / "ckpt" / "_actor" / "latest").read_text() == f"global_step{made - 1}"
        assert 2 <= made < 9
        other.unlink()
        resumed = bond(tmp_path, {**flags, "ckpt.load_enable": True})
        assert [step["step"] for step in resumed.metrics] == list(range(1, 10))
        assert resumed.metrics[: made - 1] == stopped.metrics[: made - 1]


def test_metrics(bond: Callable[..., Run], tmp_path: Path) -> None:
    """A step's line takes about 2 kB."""
    with small_disk(tmp_path / "out", "32k") as disk:
        flags = {**POOLED, "ckpt.save_steps": 1, "ckpt.max_num": 1, "train.num_episodes": 8}
        stopped = bond(tmp_path, flags, check=False)
        assert stopped.status == 1, stopped.said
        assert f"No space left on device: '{disk / 'metrics.jsonl'}'" in stopped.output
        *lines, cut = (disk / "metrics.jsonl").read_text().split("\n")
        assert len(lines) > 3
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        resumed = bond(tmp_path, {**flags, "ckpt.load_enable": True})
        assert [step["step"] for step in resumed.metrics] == list(range(1, 25))
        assert (disk / "metrics.jsonl").read_text().split("\n")[: len(lines)] == lines, f"cut short: {cut}"
