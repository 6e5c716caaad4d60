"""KDRL and DPH-RL in the real host on a tiny model: a teacher in the reference model's place, stored responses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, Tiny, execute, moved_model, recipe_for, to_argv, with_flags

pytestmark = pytest.mark.e2e

#: 1 for about three responses in four, so that some prompts are solved by the initial policy and most are not.
JUDGE = """
import torch

def reward_func(queries, prompts, labels):
    right = [float(not set("aeiou") & set(q[len(p):][:2])) for q, p in zip(queries, prompts)]
    values = torch.tensor(right)
    return {"rewards": values, "scores": values, "extra_logs": {}}
"""


@pytest.fixture
def judge(tmp_path: Path) -> str:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return str(path)


def test_kdrl_follows_a_teacher_and_anneals(bond: Callable[..., Run], tiny: Tiny, judge: str, tmp_path: Path) -> None:
    """Of a reward that is always right nothing is left but the teacher, and of the mask not even that."""
    teacher = moved_model(tiny.model, tmp_path / "teacher", seed=5, scale=0.03)
    flags = {
        "algo.advantage.estimator": "kdrl",
        "ref.model_name_or_path": str(teacher),
        "bond.kl_coef": 1.0,
        "bond.kl_coef_end": 0.4,
        "bond.anneal_steps": 6,
        "bond.mask": "response",
        "reward.remote_url": judge,
        "rollout.n_samples_per_prompt": 4,
        "train.batch_size": 64,
        "actor.adam.lr": 4e-3,
        "data.max_samples": 160,
        "train.num_episodes": 2,
    }
    steps = bond(tmp_path, flags).metrics
    assert len(steps) == 20
    for i, step in enumerate(steps):
        assert step["bond/kl_coef"] == pytest.approx(max(0.4, 1.0 - 0.1 * i))
        assert step["bond/taught"] == pytest.approx(1 - step["reward/policy"])  # the right ones are not pulled
        assert step["actor_grad_norm"] > 0
    first, last = (sum(step["bond/kl_teacher"] for step in part) / 4 for part in (steps[:4], steps[-4:]))
    print(first, last, [s["reward/policy"] for s in steps])
    assert steps[0]["bond/kl_ref"] == 0 < steps[0]["bond/kl_teacher"]
    assert last < first or steps[-1]["reward/policy"] > steps[0]["reward/policy"]


def test_dph_holds_what_is_solved(bond: Callable[..., Run], tiny: Tiny, judge: str, tmp_path: Path) -> None:
    """One optimiser step a rollout: the loss is eta times the divergence of those that are held."""
    cache = tmp_path / "stored.jsonl"
    flags = {
        "algo.advantage.estimator": "dph",
        "bond.divergence": "jensen_shannon",
        "bond.eta": 0.5,
        "bond.solved": 0.75,
        "bond.n_stored": 2,
        "bond.kl_ref": False,
        "reward.remote_url": judge,
        "rollout.n_samples_per_prompt": 4,
        "train.batch_size": 64,
        "data.max_samples": 64,
    }
    wanted = with_flags(recipe_for(tiny), {**flags, "cache.output": str(cache), "cache.samples": 4})
    command = [sys.executable, "-m", "bond_plugin", "cache", *to_argv(wanted), "--cache.log_probs"]
    made = execute(command, tmp_path)
    assert made.status == 0, made.output[-3000:]
    steps = bond(tmp_path, {**flags, "bond.reward_cache": str(cache)}).metrics
    print([{k: v for k, v in s.items() if k.startswith(("bond", "reward"))} for s in steps])
    for step in steps:
        assert 0 < step["bond/held"] < 1
        assert "bond/kl_ref" not in step
        assert 0 <= step["bond/kept"] <= 1
    assert steps[0]["bond/divergence"] == pytest.approx(0, abs=1e-3)  # the policy is what they were drawn from
    assert steps[-1]["bond/divergence"] > 1e-3
