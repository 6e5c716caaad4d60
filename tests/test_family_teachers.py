"""KDRL and DPH-RL in the real host on a tiny model: a teacher in the reference model's place, stored responses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from conftest import Run, Tiny, moved_model, recipe_for, to_argv, with_flags

pytestmark = pytest.mark.e2e

#: 1 or 0 by the prompt alone: within a prompt nothing is better, so that what is left of the loss is known.
JUDGE = """
import torch

def reward_func(queries, prompts, labels):
    values = torch.tensor([float(prompt[0] < "n") for prompt in prompts])
    return {"rewards": values, "scores": values, "extra_logs": {}}
"""


@pytest.fixture
def judged(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return {"reward.remote_url": str(path), "rollout.n_samples_per_prompt": 4, "train.batch_size": 64}


def test_kdrl_follows_its_teacher_and_anneals(
    bond: Callable[..., Run], tiny: Tiny, judged: dict[str, object], tmp_path: Path
) -> None:
    """The host's loss, a mean over tokens, is beta times the mean of log pi / pi_T over them."""
    teacher = moved_model(tiny.model, tmp_path / "teacher", seed=5, scale=0.03)
    flags = {
        **judged,
        "algo.advantage.estimator": "kdrl",
        "ref.model_name_or_path": str(teacher),
        "bond.kl_coef": 1.0,
        "bond.kl_coef_end": 0.4,
        "bond.anneal_steps": 6,
        "train.micro_batch_size": 64,  # the host's mean is one of each micro-batch
        "actor.adam.lr": 4e-3,
        "data.max_samples": 320,
    }
    steps = bond(tmp_path, flags).metrics
    assert len(steps) == 20
    for i, step in enumerate(steps):
        assert step["bond/kl_coef"] == pytest.approx(max(0.4, 1.0 - 0.1 * i))
        assert step["bond/taught"] == 1
        a_token = step["bond/kl_teacher"] / step["rollout/response_length_mean"]
        assert step["policy_loss"] == pytest.approx(step["bond/kl_coef"] * a_token, rel=0.01, abs=1e-3)
    assert steps[0]["bond/kl_ref"] == 0 < steps[0]["bond/kl_teacher"]
    assert mean(step["bond/kl_teacher"] for step in steps[-5:]) < 0.75 * steps[0]["bond/kl_teacher"]


def test_dph_holds_what_is_solved(
    bond: Callable[..., Run],
    bond_command: Callable[..., Run],
    tiny: Tiny,
    judged: dict[str, object],
    tmp_path: Path,
) -> None:
    """The loss is eta times the divergence on D_pef times its share of the prompts."""
    cache = tmp_path / "stored.jsonl"
    flags = {
        **judged,
        "algo.advantage.estimator": "dph",
        "bond.eta": 0.5,
        "bond.n_stored": 2,
        "no-bond.kl_ref": True,
        "actor.adam.lr": 4e-3,
        "data.max_samples": 64,
    }
    wanted = with_flags(recipe_for(tiny), {**flags, "cache.output": str(cache), "cache.samples": 4})
    bond_command(tmp_path, "cache", *to_argv(wanted), "--cache.log_probs")
    steps = bond(tmp_path, {**flags, "bond.reward_cache": str(cache)}).metrics
    assert len(steps) == 4
    for step in steps:
        assert 0 < step["bond/held"] < 1
        assert step["bond/held"] == step["reward/policy"] == step["reward/stored"]
        assert step["bond/kept"] == 1
        assert "bond/kl_ref" not in step
        held = step["bond/held"] * step["bond/divergence"]
        assert step["bond/loss"] == pytest.approx(0.5 * held, rel=0.02, abs=2e-3)
    assert steps[0]["bond/divergence"] == pytest.approx(0, abs=0.05)  # rounding: vLLM drew them, another computes
    assert abs(steps[-1]["bond/divergence"]) > 0.2
