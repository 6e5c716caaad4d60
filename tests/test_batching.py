"""How rows are put into batches: packed samples on CPU, and dynamic batches under real DeepSpeed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Run, Tiny, recipe_for, to_argv, with_flags
from test_distributed import launch


@pytest.fixture(scope="module")
def packing(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """As on a machine with GPUs under --bond.device cpu: flash-attn is installed, and none of its kernels, which
    would fail there, may be imported. (Where it is not installed, the dynamic batches below are packed.)
    """
    folder = tmp_path_factory.mktemp("packing")
    package, out = folder / "flash_attn", folder / "out.json"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bert_padding.py").write_text("raise RuntimeError('flash-attn was imported')")
    launch("packing.py", 1, tiny.model, out, PYTHONPATH=f"{folder}:{REPOSITORY}")
    return json.loads(out.read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["policy sdpa", "policy eager", "reward sdpa", "critic sdpa"])
def test_packed_rows_are_computed_as_padded_ones(packing: dict, model: str, dtype: str) -> None:
    """The host's own models: log-probabilities and entropy, or values, and the gradient of all parameters."""
    found = packing[f"{model} {dtype}"]
    print(found)
    assert set(found) == ({"log_probs", "entropy", "gradient"} if "policy" in model else {"values", "gradient"})
    assert max(found.values()) < (1e-5 if dtype == "fp32" else 2e-2)


KINDS = {
    "rloo": {"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 2},
    "jbond": {"algo.advantage.estimator": "jbond"},
    "critic": {"algo.advantage.estimator": "gae"},
    "critic classifier": {
        "algo.advantage.estimator": "bond",
        "bond.quantile": "learned",
        "no-bond.correction": True,
    },
}
#: Ranks: what is run there, as kind:ZeRO stage:mode (see workers/batches.py).
RUNS = {
    1: [
        *(f"{kind}:2:{mode}" for kind in KINDS for mode in ("static", "dynamic")),
        *(f"rloo:{stage}:{mode}" for stage in (1, 3) for mode in ("static", "dynamic")),
        *(f"rloo:{stage}:broken" for stage in (1, 2)),
        *(f"{kind}:2:windows" for kind in KINDS),
    ],
    2: [f"{kind}:{stage}:{mode}" for kind, stage in (("rloo", 1), ("rloo", 3), ("jbond", 2), ("critic", 2))
        for mode in ("static", "dynamic")],
}  # fmt: skip
SAME = [(ranks, run.rpartition(":")[0]) for ranks, runs in RUNS.items() for run in runs if run.endswith(":dynamic")]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("batches")
    path = folder / "flags.json"
    common = {**recipe_for(tiny), "algo.kl.init_coef": 0.0}
    path.write_text(json.dumps({kind: to_argv(with_flags(common, flags)) for kind, flags in KINDS.items()}))
    found = {}
    for ranks, runs in RUNS.items():
        out = folder / f"{ranks}.pt"
        launch("batches.py", ranks, path, out, *runs, forks=forks)
        found[ranks] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize(("ranks", "run"), SAME, ids=str)
def test_a_dynamic_batch_has_the_gradient_of_a_static_one(trained: dict[int, dict], ranks: int, run: str) -> None:
    static, dynamic = (trained[ranks][f"{run}:{mode}"] for mode in ("static", "dynamic"))
    assert 1 < dynamic["backward"] < static["backward"]  # packed, and still several
    assert static["steps"] == dynamic["steps"] == dynamic["window"] == 1
    assert static["last_rate"] == dynamic["last_rate"] < dynamic["rates"][0]
    assert static["finite"]
    assert dynamic["finite"]
    torch.testing.assert_close(dynamic["gradient"], static["gradient"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", RUNS)
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_anchor_follows_a_step_of_the_hosts_trainer(trained: dict[int, dict], ranks: int, mode: str) -> None:
    """Once: it is behind the policy by all that one step has moved that, less eta of it."""
    found = trained[ranks][f"jbond:2:{mode}"]
    assert found["behind"] == pytest.approx(1 - found["eta"], abs=1e-3) and found["eta"] > 0.01


@pytest.mark.parametrize("stage", [1, 2])
def test_without_the_mark_all_but_the_last_micro_batch_are_lost(trained: dict[int, dict], stage: int) -> None:
    wanted = trained[1][f"rloo:{stage}:static"]["gradient"]
    lost = trained[1][f"rloo:{stage}:broken"]["gradient"]
    print(wanted.norm(), lost.norm())
    assert (lost - wanted).norm() > 0.3 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_two_windows_are_two_steps_of_optimiser_and_scheduler(trained: dict[int, dict], kind: str) -> None:
    found = trained[1][f"{kind}:2:windows"]
    assert found["steps"] == found["window"] == 2
    assert found["backward"] > 4
    first, second = found["rates"]
    assert first - second == pytest.approx(second - found["last_rate"])  # linear, once a step
    assert first > second > found["last_rate"]


@pytest.mark.e2e
@pytest.mark.parametrize("flags", [
    {"algo.advantage.estimator": "rloo", "ds.packing_samples": True},
    {"algo.advantage.estimator": "reinforce_baseline", "actor.num_gpus_per_node": 2, "train.micro_batch_size": 4,
     "train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 48},
], ids=["packed", "dynamic"])  # fmt: skip
def test_whole_runs_of_the_hosts_estimators(bond: Callable[..., Run], tmp_path: Path, flags: dict[str, Any]) -> None:
    done = bond(
        tmp_path,
        {
            "rollout.n_samples_per_prompt": 4,
            "train.batch_size": 32,  # two optimiser steps a rollout
            "algo.kl.init_coef": 0.01,
            "algo.advantage.is_correction_level": "token",
            "algo.advantage.is_correction_threshold": [0, 100],
            **flags,
        },
    )
    assert len(done.metrics) == 3
    for step in done.metrics:
        assert all(math.isfinite(value) for value in step.values())
        assert step["actor_grad_norm"] > 0
        assert step["rollout/num_samples"] == 64
        # Trainer and engine are one policy: after the first step's update, too.
        assert abs(step["vllm_kl"]) < 1e-2
    assert done.metrics[-1]["kl"] != done.metrics[0]["kl"]  # from the reference: it has moved
