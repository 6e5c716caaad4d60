"""What only a GPU can show: NCCL, flash-attn, memory that sleeps. For one machine: `pytest tests/gpu`.

Each worker and each run is a process of its own. Without a GPU, or with too few, a test is skipped and says so.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS, POOLED, Run, Tiny, recipe_for, to_argv, with_flags
from test_distributed import launch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="no GPU that torch can use"),
    pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
]
STEPS = 3


def gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs, {GPUS} are here")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=gpus(2))])
def test_other_weights_are_put_in_place_and_taken_out_exactly(tmp_path: Path, ranks: int, stage: int) -> None:
    """`host.weights.Weights` in a real DeepSpeed job over NCCL."""
    out, run = tmp_path / "out.json", f"{stage}:40"
    launch("anchor.py", ranks, out, run, device="cuda")
    found = json.loads(out.read_text())[run]
    assert found["ranks"] == ranks
    assert found["error"] < 1e-2  # of the fp32 average, against float64
    for exact in ("anchor_is_rounded_average", "reference_is_initial", "restored_exactly", "trains_on", "loaded"):
        assert found[exact], exact
    assert found["distance"] == pytest.approx(found["distance_exact"], rel=1e-3)


@pytest.mark.parametrize("run", ["adam:2", "adam:3", "sleep:2", "sleep:3"])
def test_the_anchor_sleeps_with_the_masters(tiny: Tiny, tmp_path: Path, run: str) -> None:
    """`--ds.enable_sleep`: DeepSpeed takes its states off the GPU between two trainings, and the anchor goes along.

    `adam` is the same with all awake.
    """
    argv, out = tmp_path / "flags.json", tmp_path / "out.json"
    argv.write_text(json.dumps(to_argv({**recipe_for(tiny), "bond.eta": 0.1, "bond.device": "cuda"})))
    launch("kept.py", 1, argv, out, run, device="cuda")
    found = json.loads(out.read_text())[run]
    for swap in found["swaps"]:  # awake; then asleep, awake again, trained again
        assert swap["anchor"] < 1e-3
        assert swap["moved"]
        assert swap["reference"]
        assert swap["restored"]
    asleep = ["cuda", "cpu", "cuda", "cuda"] if run.startswith("sleep") else ["cuda"]
    assert [swap["device"] for swap in found["swaps"]] == asleep


@pytest.fixture(scope="module")
def packing(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("packing") / "out.json"
    launch("packing.py", 1, tiny.model, path, device="cuda")
    return json.loads(path.read_text())


@pytest.mark.parametrize("model", ["policy", "reward", "critic"])
def test_packed_rows_are_computed_as_padded_ones_by_flash_attn(packing: dict, model: str) -> None:
    """The host's own models in bf16: log-probabilities and entropy, or values, and the gradient of all parameters."""
    found = packing[f"{model} flash_attention_2 bf16"]
    print(found)
    assert max(value for name, value in found.items() if name != "gradient") < 2e-2
    assert found["gradient"] < 5e-2  # flash-attn adds up gradients in no fixed order, in 16 bits


@pytest.mark.parametrize("kind", ["pooled", "paper"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_of_jbond_is_that_of_the_cpu(tiny: Tiny, tmp_path: Path, kind: str, stage: int) -> None:
    """The host's own trainer in fp32 on the same rows: log-probabilities, and the gradient of one optimiser step."""
    flags = with_flags(recipe_for(tiny), POOLED if kind == "pooled" else {})
    run, found = f"{kind}:{stage}:static", {}
    for device in ("cpu", "cuda"):
        argv, out = tmp_path / f"{device}.json", tmp_path / f"{device}.pt"
        argv.write_text(json.dumps({kind: to_argv({**flags, "bond.device": device})}))
        launch("batches.py", 1, argv, out, run, device=device)
        found[device] = torch.load(out, weights_only=True)[run]
    here, there = found["cpu"], found["cuda"]
    torch.testing.assert_close(there["log_probs"], here["log_probs"], rtol=1e-4, atol=1e-4)
    assert here["log_probs"].abs().sum() > 0
    norm = here["gradient"].norm()
    assert norm > 0
    assert there["gradient"].norm() == pytest.approx(norm.item(), rel=1e-3)
    assert (there["gradient"] - here["gradient"]).norm() < 1e-3 * norm


@pytest.fixture(scope="module")
def long_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 prompts of 40 letters, so that a step's prompts are the last step's: vLLM caches prefixes by 16 tokens."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ("".join(LETTERS[(i * 7 + j * 3) % 26] for j in range(40)) for i in range(16))
    path.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    return path


COLOCATED = {"train.colocate_all": True}
ASLEEP = {**COLOCATED, "vllm.enable_sleep": True, "ds.enable_sleep": True}
CACHED = {"vllm.enable_prefix_caching": True}
TOKEN = {"algo.advantage.is_correction_level": "token", "algo.advantage.is_correction_threshold": [0, 100]}
#: Weights go over NCCL to an engine on a GPU of its own, and by CUDA's shared memory to one on the same GPU.
MODES = [
    pytest.param({**POOLED, **TOKEN}, id="nccl", marks=gpus(2)),
    pytest.param({**POOLED, **TOKEN, **CACHED}, id="nccl-cached", marks=gpus(2)),
    pytest.param(CACHED, id="nccl-cached-paper", marks=gpus(2)),
    pytest.param({**POOLED, **TOKEN, **COLOCATED}, id="colocated"),
    pytest.param({**POOLED, **TOKEN, **COLOCATED, **CACHED}, id="colocated-cached"),
    pytest.param({**COLOCATED, **CACHED}, id="colocated-cached-paper"),
    pytest.param({**POOLED, **TOKEN, **ASLEEP}, id="asleep"),
    pytest.param({**POOLED, **TOKEN, **ASLEEP, **CACHED, "ds.zero_stage": 3}, id="asleep-cached-zero-3"),
    pytest.param({**POOLED, **TOKEN, **ASLEEP, "ds.packing_samples": True}, id="asleep-packed"),
]


@pytest.mark.parametrize("flags", MODES)
def test_weights_reach_the_engine(
    bond: Callable[..., Run], tmp_path: Path, long_prompts: Path, flags: dict[str, Any]
) -> None:
    """Engine and trainer give the same log-probabilities after each sync of weights that have moved."""
    done = bond(tmp_path, {**run_flags(long_prompts), **flags})
    check(done, paper="bond.n_anchor_samples" not in flags)


def run_flags(prompts: Path) -> dict[str, Any]:
    """Of a run that sees the same 16 prompts in every step, its weights moving fast."""
    return {
        "data.prompt_dataset": str(prompts),
        "data.max_samples": 16,
        "data.max_len": 64,
        "train.num_episodes": STEPS,
        "actor.adam.lr": 4e-3,
        "bond.eta": 0.1,
        "ds.attn_implementation": "flash_attention_2",
        "vllm.enforce_eager": True,
        "vllm.gpu_memory_utilization": 0.3,
        "vllm.sync_backend": "nccl",
    }


def check(done: Run, paper: bool) -> None:
    """``paper``: Algorithm 2, whose anchor is sampled from too."""
    assert len(done.metrics) == STEPS
    for step in done.metrics:
        assert abs(step["vllm_kl"]) < 1e-2, step
        assert step["bond/engine_gap_policy"] < 3e-2, step  # bf16's rounding
        if paper:
            assert abs(step["vllm_kl_anchor"]) < 1e-2, step
            assert step["bond/engine_gap_anchor"] < 3e-2, step
    # Far more than the gap: an engine with weights of the step before would show.
    assert done.metrics[-1]["bond/kl_ref"] > 0.1
    assert done.metrics[-1]["bond/anchor_distance"] > 0
