"""pkpo, maxrl and posterior in the real host on a tiny model: what it logs follows from the responses alone.

The reward's file notes each response that it scores. From these the advantages of a step are worked out anew, by
definition, and with them the host's loss: at the weights that drew the samples all ratios are 1, and it is minus the
mean over tokens of the advantages.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from conftest import LETTERS, Run, Tiny

pytestmark = pytest.mark.e2e

PROMPTS, N, STEPS = 16, 4, 3
REWARD = """
import json
import torch


def reward_func(queries, prompts, labels):
    rewards = []
    for query, prompt in zip(queries, prompts):
        text = query[len(prompt):].replace("<pad>", ".").replace("<eos>", ".")  # a letter a token
        vowels = sum(letter in "aeiou" for letter in text)
        rewards.append(float({how}))
        with open({notes!r}, "a") as file:
            file.write(json.dumps([prompt, rewards[-1], len(text)]) + "\\n")
    rewards = torch.tensor(rewards)
    return {{"rewards": rewards, "scores": rewards}}
"""


def spelt(tiny: Tiny, folder: Path) -> Path:
    """The tiny model without the tokens that have no letter, so that a text says how many tokens it has."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny.model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(2 + len(LETTERS))
    model.save_pretrained(folder)
    return folder


class Noted:
    """A run of three steps over the same prompts, and what was scored in it.

    Attributes:
        metrics: of each step.
        rewards, tokens: ``[step][prompt][sample]``, rewards and lengths.
    """

    def __init__(self, bond: Callable[..., Run], tiny: Tiny, folder: Path, how: str, **flags: object) -> None:
        notes, reward = folder / "notes.jsonl", folder / "reward.py"
        reward.write_text(REWARD.format(how=how, notes=str(notes)))
        sizes = dict.fromkeys(("train.batch_size", "train.micro_batch_size", "rollout.micro_batch_size"), PROMPTS * N)
        sizes |= {"data.max_samples": PROMPTS, "rollout.n_samples_per_prompt": N, "train.num_episodes": STEPS}
        files = {"reward.remote_url": str(reward), "actor.model_name_or_path": str(spelt(tiny, folder / "model"))}
        self.metrics = bond(folder, {**sizes, **files, **flags}).metrics
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        assert len(self.metrics) == STEPS and len(lines) == STEPS * PROMPTS * N
        steps = [lines[start : start + PROMPTS * N] for start in range(0, len(lines), PROMPTS * N)]
        self.rewards, self.tokens = (
            [[[line[place] for line in step if line[0] == prompt] for prompt in {line[0]: 0 for line in step}]
             for step in steps]
            for place in (1, 2)
        )  # fmt: skip
        assert {len(samples) for step in self.rewards for samples in step} == {N}
        for step, rewards, tokens in zip(self.metrics, self.rewards, self.tokens, strict=True):
            assert step["rollout/response_length_mean"] == pytest.approx(mean(itertools.chain(*tokens)), abs=1e-5)
            assert step["reward/policy"] == pytest.approx(mean(itertools.chain(*rewards)), abs=1e-6)

    def loss(self, step: int, advantage: Callable[[float, list[float]], float]) -> float:
        """Minus the mean over tokens of the advantages, functions of a reward and the prompt's others."""
        found = []
        for rewards, tokens in zip(self.rewards[step], self.tokens[step], strict=True):
            for i, (reward, count) in enumerate(zip(rewards, tokens, strict=True)):
                found.append((advantage(reward, rewards[:i] + rewards[i + 1 :]), count))
        return -sum(a * count for a, count in found) / sum(count for _, count in found)


def best(rewards: list[float], k: int) -> float:
    """The mean over k-subsets of their largest."""
    return mean(max(subset) for subset in itertools.combinations(rewards, k))


def test_pkpo_maximises_the_best_of_two_of_four(bond: Callable[..., Run], tiny: Tiny, tmp_path: Path) -> None:
    run = Noted(bond, tiny, tmp_path, "vowels / len(text)", **{"algo.advantage.estimator": "pkpo", "bond.k": 2})
    for step, (logged, rewards) in enumerate(zip(run.metrics, run.rewards, strict=True)):
        assert logged["bond/max_at_k"] == pytest.approx(mean(best(values, 2) for values in rewards), abs=1e-6)
        wanted = run.loss(step, lambda own, others: 2 * (mean(max(own, r) for r in others) - best(others, 2)))
        assert logged["policy_loss"] == pytest.approx(wanted, abs=1e-5)


def test_maxrl_weighs_prompts_by_how_seldom_they_are_solved(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    run = Noted(bond, tiny, tmp_path, "vowels > 1", **{"algo.advantage.estimator": "maxrl"})

    def advantage(own: float, others: list[float]) -> float:
        average = mean([own, *others])
        return (own - average) / average if average else 0.0

    assert len({sum(values) for step in run.rewards for values in step}) > 3  # how many are right
    for step, (logged, rewards) in enumerate(zip(run.metrics, run.rewards, strict=True)):
        shares = [mean(values) for values in rewards]
        assert 0 < logged["bond/pass_at_n"] == mean(share > 0 for share in shares)
        assert logged["bond/no_signal"] == mean(share in (0, 1) for share in shares) < 1
        assert logged["policy_loss"] == pytest.approx(run.loss(step, advantage), abs=1e-5)


def test_maxrl_stops_at_rewards_that_are_neither_right_nor_wrong(bond: Callable[..., Run], tmp_path: Path) -> None:
    flags = {"algo.advantage.estimator": "maxrl", "rollout.n_samples_per_prompt": 2, "train.batch_size": 32}
    failed = bond(tmp_path, flags, check=False)  # the share of vowels
    assert failed.status not in (0, -1)
    assert "rewards must be 0 or 1 for maxrl, got 0." in failed.output


def test_posterior_by_jeffreys_divergence(bond: Callable[..., Run], tiny: Tiny, tmp_path: Path) -> None:
    """At the first step the policy is the reference, so that the weights are those of the rewards alone."""
    c, beta = 0.5, 0.25
    flags = {"algo.advantage.estimator": "posterior", "bond.kl_coef": c, "bond.beta": beta, "bond.max_weight": 1.5}
    run = Noted(bond, tiny, tmp_path, "vowels / len(text)", **flags)

    def weight(own: float, others: list[float]) -> float:
        return math.exp(own / c) / mean(math.exp(r / c) for r in others)

    def advantage(own: float, others: list[float]) -> float:
        return c * (1 - beta) * (min(weight(own, others), 1.5) - 1) + beta * (own - mean(others))

    first, last = run.metrics[0], run.metrics[-1]
    assert first["policy_loss"] == pytest.approx(run.loss(0, advantage), abs=1e-5)
    every = [weight(v[i], v[:i] + v[i + 1 :]) for v in run.rewards[0] for i in range(N)]
    assert 0 < first["bond/truncated"] == pytest.approx(sum(max(w - 1.5, 0) for w in every) / sum(every), abs=1e-5)
    assert first["bond/backward_kl"] == pytest.approx(-mean(math.log(w) for w in every), abs=1e-5)
    assert first["bond/kl_ref"] == 0 != last["bond/kl_ref"]
    assert 0 < first["bond/ess_min"] < first["bond/ess"] < 1
