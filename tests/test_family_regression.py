"""QRPO and A*-PO in the real host on a tiny model: from stored responses, and on the policy's samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, Tiny, recipe_for, to_argv, with_flags

PROMPTS, STORED = 16, 16
QRPO = {"algo.advantage.estimator": "qrpo", "bond.beta": 0.3}
ASTAR = {"algo.advantage.estimator": "astar_po", "bond.beta1": 0.5, "bond.beta2": 0.1}
#: Each step has all prompts.
SIZES = {"data.max_samples": PROMPTS, "train.num_episodes": 5}


@pytest.fixture(scope="module")
def stored(tiny: Tiny, bond_command: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The initial policy's responses with rewards, tokens and log-probabilities."""
    folder = tmp_path_factory.mktemp("stored")
    path = folder / "stored.jsonl"
    wanted = with_flags(recipe_for(tiny), {**QRPO, **SIZES, "cache.output": str(path), "cache.samples": STORED})
    bond_command(folder, "cache", *to_argv(wanted), "--cache.log_probs")
    return path


def rewards_of(path: Path) -> torch.Tensor:
    """``[prompts, samples]``, as the host has them."""
    _, *lines = path.read_text().splitlines()
    return torch.tensor([json.loads(line)["rewards"] for line in lines]).double()


def published(stored: Path, folder: Path) -> Path:
    """The texts and rewards of a cache in the layout of the sets that QRPO's authors published."""
    data = folder / "published.jsonl"
    with data.open("w") as file:
        for line in stored.read_text().splitlines()[1:]:
            item = json.loads(line)
            user = {"role": "user", "content": item["prompt"]}
            answer = {"role": "assistant", "content": json.dumps(item["responses"])}
            row = {"input": item["prompt"], "ref_completions": [user, answer], "ref_rewards": item["rewards"]}
            file.write(json.dumps(row) + "\n")
    return data


@pytest.mark.e2e
def test_qrpo_on_published_responses(
    bond: Callable[..., Run], dry: Callable[..., Any], stored: Path, tmp_path: Path
) -> None:
    """Each step has all responses of the set, twice: what its first loss is follows from their rewards.

    The texts of responses that were cut off get an EOS, so one more token must fit.
    """
    flags = {**QRPO, **SIZES, "data.prompt_dataset": str(published(stored, tmp_path)), "rollout.max_new_tokens": 11}
    path = tmp_path / "cache.jsonl"
    keys = {"cache.responses_key": "ref_completions", "cache.rewards_key": "ref_rewards", "cache.log_probs": True}
    made = dry({**flags, **keys, "cache.output": str(path)}, command="cache", dry_run=False)
    assert made.status == 0, made.text
    assert rewards_of(path).equal(rewards_of(stored))
    flags |= {"bond.offline": True, "bond.reward_cache": str(path)}
    done = bond(
        tmp_path,
        {
            **flags,
            "rollout.n_samples_per_prompt": STORED,
            "train.batch_size": PROMPTS * STORED,
            "train.max_epochs": 2,
            "no-bond.kl_ref": True,
            "actor.adam.lr": 2e-4,
            "actor.max_norm": 0.0,
        },
    )
    steps, known = done.metrics, rewards_of(stored)
    assert len(steps) == 5
    share = (known.unsqueeze(-1) >= known.unsqueeze(-2)).double().mean(-1)
    tilt = share / 0.3 - (share / 0.3).exp().mean(-1, keepdim=True).log()
    assert steps[0]["bond/residual"] == pytest.approx(tilt.square().mean().sqrt().item(), rel=1e-3)
    for step in steps:
        assert step["bond/quantile"] == pytest.approx(0.5)
        assert step["bond/loss"] < (0.3 * step["bond/residual"]) ** 2  # the second epoch's is made anew
        assert step["rollout/generated_tokens"] == 0
        assert "bond/kl_ref" not in step  # no initial policy is kept
    assert abs(steps[0]["bond/log_ratio"]) < 1e-2  # the stored log-probabilities are the trainer's
    assert steps[-1]["bond/residual"] < 0.6 * steps[0]["bond/residual"]


@pytest.mark.e2e
def test_astar_po_on_samples_of_the_policy(bond: Callable[..., Run], stored: Path, tmp_path: Path) -> None:
    """V* follows from the cache, the loss from the policy's log-ratio to the initial policy, and the reward rises."""
    sizes = {**SIZES, "rollout.n_samples_per_prompt": 4, "train.batch_size": 64, "train.num_episodes": 10}
    steps = bond(tmp_path, {**ASTAR, **sizes, "bond.reward_cache": str(stored)}).metrics
    assert len(steps) == 10
    value = 0.5 * (rewards_of(stored) / 0.5).exp().mean(-1).log().mean().item()
    for step in steps:
        assert step["bond/optimal_advantage"] == pytest.approx(step["reward/policy"] - value, abs=1e-5)
        assert step["bond/loss"] == pytest.approx((0.1 * step["bond/residual"]) ** 2, rel=1e-2)
        assert step["bond/log_ratio"] == pytest.approx(step["bond/kl_ref"])
    assert abs(steps[0]["bond/kl_ref"]) < 1e-3 < 0.05 < steps[-1]["bond/kl_ref"]
    first, last = (sum(step["reward/policy"] for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.03
    assert math.isfinite(steps[-1]["actor_grad_norm"])


def test_a_missing_cache_is_named_before_anything_starts(dry: Any) -> None:
    done = dry(QRPO)
    assert done.status == 2
    assert "qrpo needs the initial policy's rewards: give --bond.reward_cache, made with bond cache" in done.text
    done = dry({**QRPO, "bond.offline": True})
    assert done.status == 2
    assert "qrpo trains on stored responses: give --bond.reward_cache, with bond cache --cache.log_probs" in done.text
    done = dry({**ASTAR, "bond.offline": True})
    assert done.status == 2
    assert "--bond.beta1 0.5 and --bond.beta2 0.1: without samples of the policy" in done.text
