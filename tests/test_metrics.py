"""metrics.jsonl and run.json: what a new run, a resumed run and a killed one leave."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bond_plugin.host import state
from bond_plugin.host.metrics import MetricsFile, read, train_step


def started(folder: Path, step: int = 0) -> MetricsFile:
    args = SimpleNamespace(
        ckpt=SimpleNamespace(output_dir=str(folder)),
        logger=SimpleNamespace(wandb=SimpleNamespace(key="a1b2c3", project="p")),
        actor=SimpleNamespace(eps_clip_low_high=(0.2, 0.3)),
    )
    file = MetricsFile(args)
    file.resume(step)
    return file


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_run_sets_every_older_one_aside(tmp_path: Path) -> None:
    for run in range(3):
        file = started(tmp_path)
        file.write(1, {"run": run})
    aside = sorted(tmp_path.glob("metrics.*.jsonl"))
    assert [read(path)[0]["run"] for path in aside] in ([0, 1], [1, 0])  # within a second they have one time
    assert read(tmp_path / "metrics.jsonl")[0]["run"] == 2


def test_a_resumed_run_goes_on_without_what_it_repeats_or_what_was_cut_short(tmp_path: Path) -> None:
    file = started(tmp_path)
    for step in (1, 2, 3, 4):
        file.write(step, {"loss": float(step)})
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-10])
    resumed = started(tmp_path, 2)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    resumed.write(3, {"loss": 7.0, "share": float("nan")})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert read(tmp_path / "metrics.jsonl")[-1]["loss"] == 7
    assert read(tmp_path / "metrics.jsonl")[-1]["share"] is None
    assert not list(tmp_path.glob("metrics.*.jsonl"))


def test_run_json_has_the_arguments_and_no_secret(tmp_path: Path) -> None:
    started(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert "a1b2c3" not in text
    assert json.loads(text)["logger"] == {"wandb": {"project": "p"}}
    assert json.loads(text)["actor"] == {"eps_clip_low_high": [0.2, 0.3]}


def test_a_file_without_a_step_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no line with a step"):
        read(tmp_path / "metrics.jsonl")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = started(tmp_path)
    file.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        file.write(1, {"loss": 1.0})


def test_after_a_step_the_engines_have_the_policy_and_the_statistics_are_of_its_samples() -> None:
    def step(trainer: SimpleNamespace, samples: list[str], step: int) -> tuple[dict, int]:
        kept = state.of(trainer)
        assert kept.step == step  # on which the seeds of the step depend
        kept.policy_samples, kept.metrics["bond/win_rate"] = samples[:2], 0.5
        return {"rollout/num_samples": 3.0, "kl": 1.0}, step + 1

    kept = state.State(None, engines=SimpleNamespace(holding="anchor"))
    trainer = SimpleNamespace(
        bond=kept, _compute_rollout_stats=lambda samples: {"rollout/num_samples": float(len(samples))}
    )
    status, count = train_step(step, trainer, ["a", "b", "an anchor's"], 4)
    assert status == {"rollout/num_samples": 2.0, "kl": 1.0, "bond/win_rate": 0.5}
    assert count == kept.step == 5
    assert kept.engines.holding == "policy"
