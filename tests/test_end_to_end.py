"""The real host on a tiny model: Ray, DeepSpeed and vLLM, started by the real command."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from conftest import (
    REPOSITORY,
    SAME,
    STEPS,
    Run,
    Tiny,
    clean_environment,
    execute,
    goes_on_as,
    python_of,
    recipe_for,
    reward_server,
    to_argv,
    with_flags,
)

pytestmark = pytest.mark.e2e

DOCUMENTED = {
    "step", "reward/policy", "reward/anchor", "bond/win_rate", "bond/fire_rate", "bond/log_quantile",
    "bond/kl_anchor", "bond/kl_ref", "bond/forward_nll", "bond/anchor_distance", "bond/loss",
    "actor_grad_norm", "actor_lr", "vllm_kl", "vllm_kl_anchor", "bond/engine_gap_policy",
    "bond/engine_gap_anchor", "bond/anchor_policy_gap", "timing/generation", "timing/generate_policy",
    "timing/generate_anchor", "timing/sync_anchor", "timing/make_experience", "timing/ppo_train", "timing/broadcast",
    "timing/step_total",
}  # fmt: skip


def test_reward_rises(trained: Run) -> None:
    rewards = [step["reward/policy"] for step in trained.metrics]
    assert len(rewards) == STEPS
    assert mean(rewards[-4:]) > mean(rewards[:4]) + 0.1


def test_metrics_are_there_each_step_and_finite(trained: Run) -> None:
    for i, step in enumerate(trained.metrics):
        assert step["step"] == i + 1
        assert set(step) >= DOCUMENTED
        assert all(math.isfinite(value) for value in step.values())
        assert step["bond/log_quantile"] == pytest.approx(-math.log(16) * step["bond/fire_rate"])
        assert step["rollout/num_samples"] == 16
        assert step["rollout/reward_mean"] == pytest.approx(step["reward/policy"], abs=1e-5)
        assert step["reward"] == pytest.approx(step["reward/policy"], abs=1e-3)
        for name in ("score", "extra_logs/step"):
            assert step[name] == pytest.approx(step["reward/policy"], abs=1e-5)
    first, last = trained.metrics[0], trained.metrics[-1]
    assert first["bond/kl_anchor"] == first["bond/kl_ref"] == 0  # all three are the same weights
    assert 0 != last["bond/kl_ref"] != last["bond/kl_anchor"] != 0  # which is larger is a matter of samples
    assert last["bond/anchor_distance"] > 0
    assert "win=" in trained.output  # the progress bar


def test_trainer_and_engine_agree_for_policy_and_anchor(trained: Run) -> None:
    for step in trained.metrics:
        assert abs(step["vllm_kl"]) < 1e-2
        assert abs(step["vllm_kl_anchor"]) < 1e-2
        assert step["bond/engine_gap_policy"] < 2e-2  # mean absolute difference: bf16 rounding
        assert step["bond/engine_gap_anchor"] < 2e-2
    # The anchor's samples are the anchor's: its forward pass explains the engine's numbers, the policy's does not.
    for step in trained.metrics[4:]:
        assert step["bond/anchor_policy_gap"] > 4 * step["bond/engine_gap_anchor"]


def test_tensorboard_has_the_same_numbers(trained: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (trained.folder / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("bond/kl_anchor", "reward/policy", "bond/win_rate"):
        logged = [event.value for event in events.Scalars(f"train/{name}")]
        assert logged == pytest.approx([step[name] for step in trained.metrics], rel=1e-5)


def test_final_model_is_the_policy_and_the_anchor_is_beside_it(trained: Run, tiny: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = trained.folder / "out"
    policy = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    anchor = AutoModelForCausalLM.from_pretrained(out / "anchor", dtype=torch.bfloat16).state_dict()
    initial = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16).state_dict()
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    # After 18 steps with eta 0.1 the anchor is on its way from the initial policy to the policy.
    distance = {
        name: math.sqrt(sum(((a[k].double() - b[k].double()) ** 2).sum().item() for k in a))
        for name, a, b in (("total", policy, initial), ("lag", policy, anchor), ("done", anchor, initial))
    }
    assert distance["lag"] == pytest.approx(trained.metrics[-1]["bond/anchor_distance"], rel=0.02)
    assert 0.2 * distance["total"] < distance["lag"] < distance["total"]
    assert 0.2 * distance["total"] < distance["done"] < distance["total"]


def test_resumed_run_continues_as_the_uninterrupted_one(
    trained: Run, bond: Callable[..., Run], tmp_path: Path
) -> None:
    """Killed after step 8, while it was writing step 9."""
    shutil.copytree(trained.folder / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "_actor" / "latest").write_text("global_step8")
    shutil.rmtree(tmp_path / "ckpt" / "_actor" / "global_step16")
    (tmp_path / "out").mkdir()
    lines = (trained.folder / "out" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "metrics.jsonl").write_text("".join(lines[:8]) + lines[8][:40])
    resumed = bond(tmp_path, {**SAME, "train.num_episodes": STEPS // 3, "ckpt.load_enable": True})
    assert [step["step"] for step in resumed.metrics] == list(range(1, STEPS + 1))
    assert resumed.metrics[:8] == trained.metrics[:8]
    goes_on_as(resumed.metrics[8:], trained.metrics[8:])


# Steps small enough that the last bits of a sum over ranks do not change which tokens are sampled next.
GENTLE = {**SAME, "actor.adam.lr": 1e-4}


@pytest.fixture(scope="module")
def patched(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The additive patch on an installed copy, and the host's own command: three steps on one rank."""
    import importlib.util

    folder = tmp_path_factory.mktemp("patched")
    (installed,) = importlib.util.find_spec("openrlhf").submodule_search_locations
    target = folder / "site"
    shutil.copytree(installed, target / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    assert (target / "openrlhf" / "__init__.py").read_text() == ""
    (patch,) = (REPOSITORY / "patches").glob("*.patch")
    removed = [line for line in patch.read_text().splitlines() if line.startswith("-") and line[:3] != "---"]
    assert not removed, "patches are additive"
    subprocess.run(
        ["git", "apply", "--unidiff-zero", str(patch)],
        cwd=target,
        check=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)},
    )
    flags = {**recipe_for(tiny), **GENTLE, "ckpt.output_dir": str(folder / "out"), "ckpt.path": str(folder / "ckpt")}
    done = execute(
        [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *to_argv(flags)],
        folder,
        PYTHONPATH=str(target),
        OMP_NUM_THREADS="1",
    )
    assert done.status == 0, done.said
    return done


def test_patched_host_runs_natively(patched: Run, trained: Run) -> None:
    """The host's own command knows jbond, in all its processes."""
    assert len(patched.metrics) == 3
    # Before the first step both runs are the same, whatever their learning rates.
    for name in ("reward/policy", "reward/anchor", "bond/loss", "bond/forward_nll", "actor_grad_norm"):
        assert patched.metrics[0][name] == pytest.approx(trained.metrics[0][name], rel=1e-4), name
    for step in patched.metrics:
        assert step["bond/anchor_distance"] > 0
        assert step["bond/engine_gap_anchor"] < 2e-2


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_give_the_losses_of_one(patched: Run, bond: Callable[..., Run], tmp_path: Path, stage: int) -> None:
    """And log-probabilities and weight sync in pieces, and in the host's own way, give those of the default."""
    pieces = {2: {"bond.logits_mb": 0, "bond.sync_mb": 0}, 3: {"bond.logits_mb": 0.001, "bond.sync_mb": 0.1}}[stage]
    flags = {**GENTLE, **pieces, "actor.num_gpus_per_node": 2, "ds.zero_stage": stage}
    two = bond(tmp_path, {**flags, "train.micro_batch_size": 4, "bond.save_anchor": True})
    assert len(two.metrics) == 3
    names = ("bond/loss", "bond/forward_nll", "actor_grad_norm", "reward/policy", "reward/anchor")
    for mine, theirs in zip(two.metrics, patched.metrics, strict=True):
        # Sums over ranks round differently, so from the second step on a token may be sampled differently here
        # and there, which changes one response of sixteen.
        tolerance = {"rel": 1e-2} if mine["step"] == 1 else {"rel": 5e-2, "abs": 3e-2}
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], **tolerance), (mine["step"], name)
        assert mine["bond/anchor_distance"] == pytest.approx(theirs["bond/anchor_distance"], rel=2e-2)
        assert mine["bond/engine_gap_anchor"] < 2e-2
    assert (tmp_path / "out" / "anchor" / "model.safetensors").exists()


def test_third_party_algorithm_is_one_file_and_one_entry_point(
    bond: Callable[..., Run], forks: dict[str, str], tmp_path: Path
) -> None:
    """The file that docs/authoring.md explains, installed as anybody would install it."""
    source = tmp_path / "plugin"
    source.mkdir()
    shutil.copy(REPOSITORY / "recipes" / "authoring" / "best_of_two.py", source)
    (source / "setup.py").write_text(
        "from setuptools import setup\n"
        "setup(name='best-of-two', version='1', py_modules=['best_of_two'],\n"
        "      entry_points={'openrlhf.advantage_estimators': ['best_of_two = best_of_two:BestOfTwo']})\n"
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target",
         str(tmp_path / "site"), str(source)],
        check=True,
    )  # fmt: skip
    done = bond(
        tmp_path,
        {"algo.advantage.estimator": "best_of_two", "bond.pull": 0.5, "data.max_samples": 32,
         "rollout.n_samples_per_prompt": 2, "train.batch_size": 32},
        PYTHONPATH=os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", ""))),
        **forks,
    )  # fmt: skip
    assert len(done.metrics) == 2
    for step in done.metrics:
        assert step["best_of_two/spread"] > 0
        assert step["actor_grad_norm"] > 0
        assert step["rollout/num_samples"] == 32


def test_reward_server_several_samples_engines_epochs_and_wandb(bond: Callable[..., Run], tmp_path: Path) -> None:
    """HTTP reward with many ties; 2 policy and 3 anchor samples from 2 engines; 2 optimiser steps and 2 epochs."""
    queries: list[str] = []

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        queries.extend(asked["query"])
        rewards = float(asked["query"][0][len(asked["prompts"][0]) :].count("e"))
        return {"rewards": rewards, "scores": rewards}

    with reward_server(answer) as address:
        done = bond(
            tmp_path,
            {
                "reward.remote_url": address,
                "rollout.n_samples_per_prompt": 2,
                "bond.n_anchor_samples": 3,
                "vllm.num_engines": 2,
                "bond.eta": 1.0,
                "train.max_epochs": 2,
                "data.max_samples": 32,
                "train.micro_batch_size": 6,
                "rollout.micro_batch_size": 6,
                "actor.adam.lr": 2e-2,
                "logger.wandb.key": "0" * 40,
            },
            WANDB_MODE="offline",
            WANDB_DIR=str(tmp_path),
        )
    assert len(done.metrics) == 2
    assert len(queries) == 2 * 16 * (2 + 3)  # policy and anchor by the same path
    for step in done.metrics:
        assert step["bond/anchor_distance"] == 0.0  # --bond.eta reached the training workers
        assert step["bond/log_quantile"] == pytest.approx(-8 * math.log(2) * step["bond/fire_rate"])
        assert step["ppo_clip_ratio"] > 0  # --train.max_epochs 2 is off-policy: ratios, clipped

    # Weights & Biases got the same numbers: its file of an offline run holds names and JSON values as text.
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged = path.read_bytes()
    for name in ("reward/policy", "bond/kl_anchor", "timing/generate_anchor"):
        assert f"train/{name}".encode() in logged
        assert json.dumps(done.metrics[-1][name]).encode() in logged


def test_exception_in_the_reward_function_stops_the_run_with_its_traceback(
    bond: Callable[..., Run], tmp_path: Path
) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def reward_func(queries, prompts, labels):\n    return {}['no such key here']\n")
    failed = bond(tmp_path, {"reward.remote_url": str(path)}, check=False)
    assert failed.status not in (0, -1)
    assert "KeyError: 'no such key here'" in failed.output
    assert "reward.py" in failed.output
    assert "RewardError" in failed.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_running_cluster_and_submitted_job(
    bond: Callable[..., Run], tiny: Tiny, forks: dict[str, str], tmp_path: Path
) -> None:
    """RAY_ADDRESS, and `ray job submit`, against one cluster. Of its jobs the first may have copies for workers."""
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    address, dashboard = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    ray = Path(sys.executable).with_name("ray")
    short = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets have a limit on the length of their path
    with (tmp_path / "cluster.txt").open("w") as log:
        cluster = subprocess.Popen(
            [ray, "start", "--head", "--block", f"--port={ports[0]}",
             f"--dashboard-port={ports[1]}", "--include-dashboard=true", "--num-cpus=6", "--num-gpus=2",
             f"--dashboard-agent-listen-port={ports[2]}",  # its default is taken where another cluster runs
             f"--temp-dir={short}"],
            env=clean_environment(**forks), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.time() + 90
        while True:
            try:
                urllib.request.urlopen(f"{dashboard}/api/version", timeout=5).read()
                break
            except OSError:
                assert time.time() < deadline, (tmp_path / "cluster.txt").read_text()[-2000:]
                time.sleep(1)
        # Attached: iterative BOND, whose anchor is a copy of the policy every second step.
        iterative = {"algo.advantage.estimator": "bond", "bond.anchor": "periodic", "bond.anchor_interval": 2,
                     "bond.n": 2, "bond.n_anchor_samples": 4, "train.num_episodes": 4}  # fmt: skip
        done = bond(tmp_path / "attached", {**iterative, "bond.device": "cpu"}, RAY_ADDRESS=address, **forks)
        steps = done.metrics
        assert [step["bond/anchor_distance"] == 0 for step in steps] == [False, True] * 6
        assert all(abs(step["bond/kl_anchor"]) < 1e-3 for step in steps[::2])  # drawn right after a copy
        assert mean(step["reward/policy"] for step in steps[-3:]) > mean(step["reward/policy"] for step in steps[:3])
        assert all(step["bond/engine_gap_anchor"] < 2e-2 for step in steps)

        # Submitted: Best-of-N fine-tuning.
        folder = tmp_path / "submitted"
        tuning = {"bond.device": "cpu", "algo.advantage.estimator": "bon_sft", "bond.n": 4}
        folders = {"ckpt.output_dir": str(folder / "out"), "ckpt.path": str(folder / "ckpt")}
        wanted = with_flags(recipe_for(tiny), {**tuning, **folders})
        for _ in range(10):
            submitted = execute(
                [str(ray), "job", "submit", f"--address={dashboard}", "--runtime-env-json",
                 json.dumps({"env_vars": {"NCCL_DEBUG": "WARN", "HF_HUB_OFFLINE": "1"}}), "--",
                 sys.executable, "-m", "bond_plugin", "train", *to_argv(wanted)],
                folder,
            )  # fmt: skip
            if "please try again later" not in submitted.output:  # a busy machine's agent has not answered yet
                break
            time.sleep(6)
        assert submitted.status == 0, submitted.said
        assert len(submitted.metrics) == 3
        # The same policy on the same prompts with the same seeds.
        assert submitted.metrics[0]["reward/policy"] == pytest.approx(steps[0]["reward/policy"], rel=1e-6)
        assert submitted.metrics[0]["reward/reference"] > 0
        assert submitted.metrics[0]["bond/kl_ref"] == 0 != submitted.metrics[1]["bond/kl_ref"]
    finally:
        os.killpg(cluster.pid, signal.SIGTERM)
        try:
            cluster.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(cluster.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)


def test_what_two_ranks_saved_is_resumed_by_one(
    bond: Callable[..., Run], forks: dict[str, str], tmp_path: Path
) -> None:
    """By the commands that the run prints when it refuses: DeepSpeed's conversion, and our files copied."""
    flags = {**GENTLE, "train.num_episodes": 2, "ds.zero_stage": 3, "ckpt.save_steps": 3}
    (tmp_path / "whole").mkdir()
    whole = bond(tmp_path / "whole", {**flags, "actor.num_gpus_per_node": 2})
    shutil.copytree(whole.folder / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "_actor" / "latest").write_text("global_step3")
    (tmp_path / "out").mkdir()
    shutil.copy(whole.folder / "out" / "metrics.jsonl", tmp_path / "out")
    resuming = {**flags, "ckpt.load_enable": True}
    refused = bond(tmp_path, resuming, check=False)
    assert refused.status == 2
    assert "was written by 2 ranks, and this run has 1: add --ds.use_universal_ckpt" in refused.output
    command = refused.output[refused.output.index("python -m deepspeed") :].splitlines()[0]
    command = command.replace("python", python_of(forks), 1)
    subprocess.run(command, shell=True, check=True, env=clean_environment(**forks))
    resumed = bond(tmp_path, {**resuming, "ds.use_universal_ckpt": True})
    assert [step["step"] for step in resumed.metrics] == list(range(1, 7))
    assert resumed.metrics[:3] == whole.metrics[:3]
    for mine, theirs in zip(resumed.metrics[3:], whole.metrics[3:], strict=True):
        # As above: the same weights draw the same, and after a step a token may be another.
        tolerance = {"rel": 1e-2, "abs": 1e-4} if mine["step"] == 4 else {"rel": 5e-2, "abs": 3e-2}
        for name in ("bond/loss", "bond/forward_nll", "actor_grad_norm", "reward/policy", "reward/anchor"):
            assert mine[name] == pytest.approx(theirs[name], **tolerance), (mine["step"], name)
        assert mine["bond/anchor_distance"] == pytest.approx(theirs["bond/anchor_distance"], rel=2e-2)
        assert mine["actor_lr"] == theirs["actor_lr"]
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step6"
    assert (tmp_path / "ckpt" / "_actor" / "global_step3_universal").is_dir()
