"""Best-of-Poisson and the exponential tilt in the real host on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import POOLED, Run, Tiny

pytestmark = pytest.mark.e2e


def test_jbond_with_best_of_poisson(bond: Callable[..., Run], tmp_path: Path) -> None:
    """From the policy's own samples, a mean of 1.5 samples."""
    flags = {**POOLED, "bond.target": "best_of_poisson", "bond.n": 1.5, "bond.eta": 0.5, "train.num_episodes": 3}
    done = bond(tmp_path, flags)
    steps = done.metrics
    assert len(steps) == 9
    # The anchor is the policy: all weights are one, each sample beats half of the others, F has its mean of ranks.
    assert steps[0]["bond/win_rate"] == pytest.approx(0.5, abs=1e-3)
    assert steps[0]["bond/ess"] == pytest.approx(1.0, abs=1e-3)
    assert steps[0]["bond/kl_anchor"] == pytest.approx(0.0, abs=1e-3)
    assert all(step["bond/kl_ref"] > 0 and math.isfinite(step["bond/log_quantile"]) for step in steps[1:])
    first, last = (sum(s["reward"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first


def test_vbon_with_the_exponential_target_has_the_quantile_for_its_reward(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """The cached rewards are spread evenly over [0, 1], so that the share below a reward is the reward."""
    cache, temperature = tmp_path / "rewards.jsonl", 0.3
    prompts = sorted({json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()})
    rewards = [(i + 0.5) / 1000 for i in range(1000)]
    cache.write_text("".join(json.dumps({"prompt": prompt, "rewards": rewards}) + "\n" for prompt in prompts))
    flags = {
        "algo.advantage.estimator": "rloo",
        "reward.transform": "vbon",
        "vbon.target": "exponential",
        "vbon.temperature": temperature,
        "bond.reward_cache": str(cache),
        "bond.reward_cache_mismatch": "warn",
        "rollout.n_samples_per_prompt": 4,
        "train.batch_size": 64,
    }
    done = bond(tmp_path, flags)
    assert len(done.metrics) == 3
    log_z = math.log(temperature * math.expm1(1 / temperature))
    for step in done.metrics:
        assert step["vbon/reward"] == pytest.approx(step["reward/policy"] - temperature * log_z, abs=1e-3)
    assert "--algo.kl.init_coef is 0.3" in done.output
