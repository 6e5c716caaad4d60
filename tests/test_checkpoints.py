"""Which checkpoint a run resumes from, and which are deleted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bond_plugin.host import checkpoints
from bond_plugin.host.weights import CheckpointError

POLICY = SimpleNamespace(critic=SimpleNamespace(model_name_or_path=None))
WITH_CRITIC = SimpleNamespace(critic=SimpleNamespace(model_name_or_path="model"))


def run_of(root: Path, ranks: int, stage: int, universal: bool = False, optim: str = "adam") -> SimpleNamespace:
    """The arguments of a run that would resume from ``root``."""
    return SimpleNamespace(
        ckpt=SimpleNamespace(path=str(root)),
        ds=SimpleNamespace(use_universal_ckpt=universal, zero_stage=stage),
        actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=ranks, optim=optim),
        critic=SimpleNamespace(model_name_or_path=None),
    )


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


def test_a_latest_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"global_step1": None}, "global_step2")
    with pytest.raises(CheckpointError, match=r"names global_step2, which is not there.*global_step1"):
        checkpoints.latest(POLICY, folder)


def written(root: Path, ranks: int, stage: int) -> Path:
    """What DeepSpeed and we leave, by name alone."""
    folder = folder_of(root, {"global_step4": None}, "global_step4") / "global_step4"
    for rank in range(ranks):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (folder / f"bond_anchor_rank_{rank:05d}.pt").touch()
        if stage == 3:
            (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if stage != 3:
        (folder / "mp_rank_00_model_states.pt").touch()
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_other_ranks_are_told_how_to_convert(tmp_path: Path, stage: int) -> None:
    folder = written(tmp_path, 2, stage)
    assert checkpoints.problems(run_of(tmp_path, 2, stage)) == []
    (problem,) = checkpoints.problems(run_of(tmp_path, 1, stage))
    assert "was written by 2 ranks, and this run has 1: add --ds.use_universal_ckpt" in problem
    assert f"--input_folder {folder} --output_folder {folder}_universal && cp {folder}/bond_anchor_rank_*" in problem
    (problem,) = checkpoints.problems(run_of(tmp_path, 1, stage, optim="muon"))
    assert "use 2: DeepSpeed does not convert Muon's states" in problem
    (problem,) = checkpoints.problems(run_of(tmp_path, 1, stage, universal=True))
    assert "is not converted: python -m deepspeed.checkpoint.ds_to_universal" in problem
    (problem,) = checkpoints.problems(run_of(tmp_path, 2, 5 - stage))
    assert "DeepSpeed reads it at no other" in problem
    if stage == 2:
        assert checkpoints.problems(run_of(tmp_path, 2, 1)) == []


def test_a_conversion_is_resumed_by_any_ranks_until_there_is_a_newer_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, 2, 2)
    folder = tmp_path / "_actor"
    (folder / "global_step4_universal").mkdir()
    (folder / "global_step4_universal" / "mp_rank_00_model_states.pt").touch()
    (folder / "latest_universal").write_text("global_step4_universal")
    assert checkpoints.problems(run_of(tmp_path, 5, 1, universal=True)) == []
    assert checkpoints.latest(POLICY, folder, universal=True) == "global_step4_universal"
    assert "at stage 1 or 2" in checkpoints.problems(run_of(tmp_path, 5, 3, universal=True))[0]
    (folder / "global_step8").mkdir()
    (folder / "latest").write_text("global_step8")
    assert "global_step8 is not converted" in checkpoints.problems(run_of(tmp_path, 5, 2, universal=True))[0]
    assert superfluous(folder, "global_step8", 1) == {"global_step4"}  # what was converted on purpose stays


def test_resuming_where_latest_is_gone_is_refused_before_the_start(tmp_path: Path) -> None:
    folder_of(tmp_path, {"global_step1": None}, "global_step2")
    (problem,) = checkpoints.problems(run_of(tmp_path, 1, 2))
    assert "names global_step2, which is not there" in problem


def anchor_of(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        torch.save({"ranks": ranks, "anchor": [torch.zeros(9)]}, checkpoints.anchor_file(folder, rank))


def test_an_anchor_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    anchor_of(tmp_path, 3)
    assert len(checkpoints._anchor_states(tmp_path)) == 3
    anchor_of(tmp_path, 2)  # and the third rank's of before is still there
    assert len(checkpoints._anchor_states(tmp_path)) == 2
    anchor_of(tmp_path, 3)
    last = Path(checkpoints.anchor_file(tmp_path, 2))
    whole = last.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        last.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not whole"):
            checkpoints._anchor_states(tmp_path)
    last.unlink()
    with pytest.raises(CheckpointError, match=r"is missing.*copy them from"):
        checkpoints._anchor_states(tmp_path)
    torch.save({"ranks": 4, "anchor": []}, last)
    with pytest.raises(CheckpointError, match="was written by another run"):
        checkpoints._anchor_states(tmp_path)


def test_a_first_checkpoint_that_was_cut_short_is_the_hosts_beginning(tmp_path: Path) -> None:
    import transformers.modeling_utils  # noqa: F401, which looks for flash-attn

    from bond_plugin.host import cpu

    with cpu.flash_attn_stand_in():
        from openrlhf.trainer.ppo_trainer import BasePPOTrainer
    folder = folder_of(tmp_path, {"global_step2": None})  # no `latest` names it
    args, said = run_of(tmp_path, 1, 2), []
    args.ckpt.load_enable = False
    strategy = SimpleNamespace(args=args, print=said.append)
    path, states = checkpoints.load_ckpt(None, strategy, None, str(folder))
    assert path is None and states == BasePPOTrainer.init_checkpoint_states(SimpleNamespace(args=args))
    assert said == [f"bond: note: {folder} holds no whole checkpoint: the run starts at step 0"]
