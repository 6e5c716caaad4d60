"""BOND, bon_sft and vBoN in the real host on a tiny model: one and two ranks, from flags and from a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from conftest import Run, Tiny, nested

pytestmark = pytest.mark.e2e


def as_recipe(flags: dict[str, Any], path: Path) -> Path:
    """Dotted flags as a recipe file."""
    path.write_text(yaml.safe_dump(nested(flags)))
    return path


def test_bond_with_a_learned_quantile_on_two_ranks_from_a_recipe(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """The classifier sits in the critic slot, is sharded, trained and checkpointed by the host."""
    recipe = as_recipe(
        {
            "algo.advantage.estimator": "bond",
            "bond.n": 4,
            "bond.beta": 0.5,
            "bond.quantile": "learned",
            "bond.correction": False,
            "critic.adam.lr": 3e-3,
            "critic.lr_warmup_ratio": 0.0,
            "actor.num_gpus_per_node": 2,
            "ds.zero_stage": 3,
            "train.micro_batch_size": 4,
            "train.num_episodes": 3,
            "ckpt.save_steps": 8,
        },
        tmp_path / "recipe.yaml",
    )
    ours = {"recipe": str(recipe), "algo.advantage.estimator": None, "actor.num_gpus_per_node": None,
            "ds.zero_stage": None, "train.micro_batch_size": None}  # fmt: skip
    done = bond(tmp_path, {**ours, "data.max_samples": 48})
    steps = done.metrics
    assert len(steps) == 9
    for step in steps:
        assert step["reward/reference"] != step["reward/policy"]
        assert 0 < step["bond/quantile"] < 1
        assert math.isfinite(step["bond/backward_kl"])
        assert step["critic_grad_norm"] > 0
        assert step["bond/engine_gap_reference"] < 2e-2  # the engine held the initial policy's weights
    assert steps[0]["bond/quantile_bce"] == pytest.approx(math.log(2), abs=0.15)  # it knows nothing yet
    assert mean(s["bond/quantile_bce"] for s in steps[-4:]) < mean(s["bond/quantile_bce"] for s in steps[:2])
    assert steps[-1]["bond/kl_ref"] == steps[-1]["bond/kl_anchor"] != 0  # the anchor is the initial policy
    assert (tmp_path / "ckpt" / "_critic" / "global_step8").is_dir()


def test_bon_sft_on_two_ranks_with_a_reward_model_actor(bond: Callable[..., Run], tiny: Tiny, tmp_path: Path) -> None:
    done = bond(
        tmp_path,
        {
            "algo.advantage.estimator": "bon_sft",
            "bond.n": 4,
            "bond.kl_coef": 0.1,
            "actor.num_gpus_per_node": 2,
            "ds.zero_stage": 2,
            "train.micro_batch_size": 4,
            "reward.remote_url": None,
            "reward.model_name_or_path": str(tiny.model),
            "data.max_samples": 48,
        },
    )
    for step in done.metrics:
        assert step["reward/policy"] != step["reward/reference"]
        assert 0 < step["bond/win_rate"] < 1
        assert step["bond/engine_gap_reference"] < 2e-2
    assert done.metrics[-1]["bond/forward_nll"] > 0
    assert "bond/anchor_distance" not in done.metrics[-1]  # it keeps no anchor


def test_bond_with_an_ema_anchor_on_two_ranks(bond: Callable[..., Run], tmp_path: Path) -> None:
    flags = {"bond.n": 2, "bond.n_anchor_samples": 4, "bond.anchor": "ema", "bond.eta": 0.5}
    ranks = {"actor.num_gpus_per_node": 2, "ds.zero_stage": 3, "train.micro_batch_size": 4}
    done = bond(tmp_path, {"algo.advantage.estimator": "bond", **flags, **ranks})
    assert len(done.metrics) == 3
    assert [step["bond/anchor_distance"] > 0 for step in done.metrics] == [True] * 3
    assert done.metrics[-1]["bond/kl_anchor"] != done.metrics[-1]["bond/kl_ref"]  # it moves
    assert done.metrics[-1]["bond/engine_gap_anchor"] < 2e-2


def test_bond_with_cached_rewards(bond: Callable[..., Run], reward_cache: Path, tmp_path: Path) -> None:
    """No sample of the reference is drawn: its rewards are in the file, which was made for the host's estimators."""
    flags = {"bond.n": 4, "bond.beta": 1.0, "bond.reward_cache": str(reward_cache), "train.num_episodes": 3,
             "bond.reward_cache_mismatch": "warn"}  # fmt: skip
    done = bond(tmp_path, {"algo.advantage.estimator": "bond", **flags})
    assert len(done.metrics) == 9
    assert all(0 < step["bond/quantile"] < 1 for step in done.metrics)
    assert all("reward/reference" not in step for step in done.metrics)
    assert 16 <= done.metrics[0]["rollout/generated_tokens"] <= 16 * 10
    first, last = (mean(s["bond/quantile"] for s in part) for part in (done.metrics[:3], done.metrics[-3:]))
    assert last > first


def test_vbon_on_rloo_on_two_ranks_from_a_recipe(
    bond: Callable[..., Run], tiny: Tiny, reward_cache: Path, tmp_path: Path
) -> None:
    """The host's own estimator, loss and reference model; the reward and the KL coefficient are vBoN's."""
    recipe = as_recipe(
        {
            "algo.advantage.estimator": "rloo",
            "reward.transform": "vbon",
            "vbon.n": 16,
            "vbon.bound": "exact",
            "bond.reward_cache": str(reward_cache),
            "actor.num_gpus_per_node": 2,
            "actor.adam.lr": 4e-3,
            "rollout.n_samples_per_prompt": 4,
            "train.batch_size": 64,
            "train.micro_batch_size": 16,
            "train.num_episodes": 3,
        },
        tmp_path / "recipe.yaml",
    )
    ours = {"recipe": str(recipe), "algo.advantage.estimator": None, "actor.num_gpus_per_node": None,
            "actor.adam.lr": None, "rollout.n_samples_per_prompt": None, "train.batch_size": None,
            "train.micro_batch_size": None}  # fmt: skip
    done = bond(tmp_path, ours)
    steps = done.metrics
    assert len(steps) == 9
    rewards = [step["reward/policy"] for step in steps]
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.03
    assert mean(s["bond/quantile"] for s in steps[-3:]) > mean(s["bond/quantile"] for s in steps[:3])
    assert abs(steps[0]["bond/kl_ref"]) < 1e-3
    assert abs(steps[-1]["bond/kl_ref"]) > 1e-3
    assert steps[0]["reward"] == pytest.approx(rewards[0], abs=1e-4)  # the host goes on logging the reward itself
    assert "--algo.kl.init_coef is 0.0666" in done.output


def test_vbon_on_ppo_with_a_critic_from_flags(
    bond: Callable[..., Run], tiny: Tiny, reward_cache: Path, tmp_path: Path
) -> None:
    done = bond(
        tmp_path,
        {
            "algo.advantage.estimator": "gae",
            "reward.transform": "vbon",
            "vbon.n": 4,
            "bond.reward_cache": str(reward_cache),
            "data.max_samples": 32,
        },
    )
    assert len(done.metrics) == 2
    for step in done.metrics:
        assert step["vbon/reward"] < 0
        assert step["bond/log_quantile"] < 0
        assert math.isfinite(step["critic_loss"])
