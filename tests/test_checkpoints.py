"""Which checkpoint a run resumes from, and which are deleted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bond_plugin.host import checkpoints
from bond_plugin.host.weights import CheckpointError

POLICY = SimpleNamespace(critic=SimpleNamespace(model_name_or_path=None))
WITH_CRITIC = SimpleNamespace(critic=SimpleNamespace(model_name_or_path="model"))


def folder_of(root: Path, names: dict[str, float | None], latest: str | None = None, part: str = "_actor") -> Path:
    """A folder of checkpoints of 1,000 bytes, oldest first, each with its metric."""
    folder = root / part
    for age, (name, metric) in enumerate(names.items()):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights.pt").write_bytes(b"x" * 1000)
        if metric is not None:
            (folder / name / "metric").write_text(str(metric))
        os.utime(folder / name, (age, age))
    if latest is not None:
        (folder / "latest").write_text(latest)
    return folder


def superfluous(folder: Path, saved: str, max_num: int, max_bytes: float = 1e9, args: Any = POLICY) -> set[str]:
    def metric(path: str) -> float | None:
        file = Path(path, "metric")
        return float(file.read_text()) if file.exists() else None

    strategy = SimpleNamespace(args=args, _read_ckpt_metric=metric)
    return {path.name for path in checkpoints._superfluous(strategy, folder, saved, max_num, max_bytes)}


def test_the_oldest_go_and_the_one_just_saved_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("global_step1", "global_step2", "global_step3")), "global_step3")
    assert superfluous(folder, "global_step3", 2) == {"global_step1"}
    assert superfluous(folder, "global_step3", 1) == {"global_step1", "global_step2"}
    assert superfluous(folder, "global_step3", 0) == {"global_step1", "global_step2"}
    assert superfluous(folder, "global_step3", 3) == set()


def test_the_worst_by_metric_goes_but_never_the_latest(tmp_path: Path) -> None:
    metrics = {"global_step1": 0.9, "global_step2": None, "global_step3": 0.5, "global_step4": 0.1}
    folder = folder_of(tmp_path, metrics, "global_step4")
    assert superfluous(folder, "global_step4", 3) == {"global_step2"}
    assert superfluous(folder, "global_step4", 2) == {"global_step2", "global_step3"}


def test_what_the_critics_latest_names_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"global_step1": None, "global_step2": None}, "global_step2")
    folder_of(tmp_path, {"global_step1": None}, "global_step1", "_critic")
    assert superfluous(folder, "global_step2", 1, args=WITH_CRITIC) == set()
    assert superfluous(folder, "global_step2", 1) == {"global_step1"}  # a critic's of an earlier run


def test_old_best_ones_go_and_do_not_count(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("best_global_step1", "global_step2", "best_global_step3")))
    assert superfluous(folder, "best_global_step3", 1) == {"best_global_step1"}
    assert superfluous(folder, "global_step2", 1) == set()


def test_too_large_together(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("global_step1", "global_step2", "global_step3")), "global_step3")
    assert superfluous(folder, "global_step3", 9, 2500) == {"global_step1"}
    assert superfluous(folder, "global_step3", 9, 10) == {"global_step1", "global_step2"}


def test_resuming_takes_what_policy_and_critic_both_have(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("global_step9", "global_step10")), "global_step10")
    folder_of(tmp_path, {"global_step9": None}, "global_step9", "_critic")
    assert checkpoints.latest(WITH_CRITIC, folder) == "global_step9"
    assert checkpoints.latest(POLICY, folder) == "global_step10"


def test_a_first_checkpoint_that_was_cut_short_is_none(tmp_path: Path) -> None:
    assert checkpoints.latest(POLICY, folder_of(tmp_path, {"global_step1": None})) is None


def test_a_full_disk_is_named_with_the_checkpoint(tmp_path: Path) -> None:
    class Engine:
        global_steps = 3

        def save_checkpoint(self, *_: Any, **__: Any) -> None:
            Path("/dev/full").write_bytes(b"x")

    folder = folder_of(tmp_path, {"global_step1": None}, "global_step1")
    with pytest.raises(
        CheckpointError, match=rf"{folder}/global_step3: No space left on device, .* before are whole"
    ):
        checkpoints.save_ckpt(None, POLICY, Engine(), str(folder))
    assert checkpoints.latest(POLICY, folder) == "global_step1"


def test_a_latest_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"global_step1": None}, "global_step2")
    with pytest.raises(CheckpointError, match=r"names global_step2, which is not there.*global_step1"):
        checkpoints.latest(POLICY, folder)
