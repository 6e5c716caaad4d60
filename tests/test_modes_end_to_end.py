"""The host's modes in whole runs: J-BOND's pooled form, which uses the host's own rollouts, replay and loss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from conftest import POOLED, Run, Tiny, recipe_for, to_argv, with_flags
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.e2e

#: Trainer and engine are compared, and no token is dropped.
COMPARED = {"algo.advantage.is_correction_level": "token", "algo.advantage.is_correction_threshold": [0, 100]}


def sound(done: Run, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run, each step once and every number finite."""
    assert [step["step"] for step in done.metrics] == list(range(1, steps + 1))
    for step in done.metrics:
        assert all(math.isfinite(value) for value in step.values()), step
        assert step["actor_grad_norm"] > 0
    return done.metrics


def cut_back(run: Run, folder: Path, step: int) -> None:
    """Into ``folder`` what a run left that was killed while it wrote the line after ``step``."""
    shutil.copytree(run.folder / "ckpt", folder / "ckpt")
    actor = folder / "ckpt" / "_actor"
    for later in actor.glob("global_step*"):
        if int(later.name.removeprefix("global_step")) > step:
            shutil.rmtree(later)
    (actor / "latest").write_text(f"global_step{step}")
    (folder / "out").mkdir()
    lines = (run.folder / "out" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "out" / "metrics.jsonl").write_text("".join(lines[:step]) + lines[step][:40])


def test_asynchronous_partial_rollouts_with_reward_actors_and_resume(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """The anchor is a copy of the policy (eta 1): log pi - log pi_anchor is 0 to the bit, after resuming too."""
    flags = {
        **POOLED,
        **COMPARED,
        "bond.eta": 1.0,
        "train.async_enable": True,
        "train.partial_rollout_enable": True,
        "reward.remote_url": None,
        "reward.model_name_or_path": str(tiny.model),
        "reward.num_gpus_per_node": 2,
        "rollout.micro_batch_size": 8,
        "ckpt.save_steps": 2,
        "data.max_samples": 80,
    }
    (tmp_path / "whole").mkdir()
    whole = bond(tmp_path / "whole", flags)
    steps = sound(whole, 5)
    cut_back(whole, tmp_path / "resumed", 2)
    resumed = bond(tmp_path / "resumed", {**flags, "ckpt.load_enable": True})
    again = sound(resumed, 5)
    assert again[:2] == steps[:2]
    for step in (*steps, *again):
        assert step["bond/kl_anchor"] == 0
        assert step["bond/anchor_distance"] == 0
        assert "vllm_kl" in step
        assert 0 < step["bond/ess"] <= 1 + 1e-9
    assert again[2]["bond/kl_ref"] != 0  # the policy of the checkpoint, and not the initial one


def test_two_ranks_with_several_steps_and_epochs_filtering_and_evaluation(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text("".join(tiny.prompts.read_text().splitlines(keepends=True)[-6:]))
    done = bond(
        tmp_path,
        {
            **POOLED,
            **COMPARED,
            "train.batch_size": 32,
            "train.max_epochs": 2,
            "train.micro_batch_size": 4,
            "actor.num_gpus_per_node": 2,
            "actor.entropy_coef": 0.001,
            "actor.dual_clip": 3.0,
            "ds.zero_stage": 3,
            "vllm.num_engines": 2,
            "algo.dynamic_filtering_enable": True,
            "algo.dynamic_filtering_range": [0.12, 0.28],  # half of the prompts: 16 in turn are too rare to be met
            "eval.dataset": str(evaluated),
            "eval.steps": 2,
            "eval.n_samples_per_prompt": 2,
            "data.max_samples": 160,
            "logger.tensorboard_dir": str(tmp_path / "tensorboard"),
        },
    )
    steps = sound(done, len(done.metrics))
    assert 3 <= len(steps) < 10  # more prompts than 16 are needed for a step
    for step in steps:
        assert abs(step["vllm_kl"]) < 1e-2
        assert step["entropy_loss"] > 0
        assert step["dynamic_filtering_pass_rate"] < 400  # in samples, four a prompt
        assert 0.1 < step["reward/policy"] < 0.3
        assert step["rollout/num_samples"] == 64
        assert step["bond/engine_gap_policy"] < 2e-2
        assert step["extra_logs/step"] == pytest.approx(step["reward/policy"], abs=1e-3)
    assert any(step["ppo_clip_ratio"] > 0 for step in steps)  # later steps of a rollout are off-policy
    assert steps[0]["bond/kl_ref"] == steps[0]["bond/kl_anchor"] == 0
    for step in steps[1:]:  # which is larger is a matter of samples
        assert 0 != step["bond/kl_ref"] != step["bond/kl_anchor"] != 0
    assert "eval_num_samples': 12.0" in done.output


def test_a_loss_of_the_algorithms_own_and_a_teacher_with_packed_dynamic_batches(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """What the loss is at the old policy, the algorithm knew from the same log-probabilities. The teacher is the
    initial policy as a model of its own, beside its weights that are kept in the policy's workers.
    """
    shutil.copy(Path(__file__).with_name("squared.py"), tmp_path)
    done = bond(
        tmp_path,
        {
            "algo.advantage.estimator": "squared:Taught",
            "ref.model_name_or_path": str(tiny.model),
            "rollout.n_samples_per_prompt": 4,
            "train.batch_size": 64,
            "train.dynamic_batch_enable": True,
            "data.max_samples": 48,
        },
    )
    steps = sound(done, 3)
    for step in steps:
        assert step["bond/loss"] == pytest.approx(step["squared/before"], rel=1e-2)
        assert step["squared/kl"] == pytest.approx(step["bond/kl_ref"], abs=1e-2)
    assert abs(steps[-1]["bond/kl_ref"]) > 0.05


def test_a_loss_on_the_logits_of_a_teacher_of_another_size(
    bond: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """A response's backward KL, token by token over the vocabulary, is its log-ratio to the teacher on average;
    here with ZeRO-3 over two ranks, packed, and micro-batches by tokens, in which rows stand in another order.
    """
    config = LlamaConfig.from_pretrained(tiny.model, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    for file in tiny.model.glob("*token*"):
        shutil.copy(file, tmp_path / "teacher")
    done = bond(
        tmp_path,
        {
            "algo.advantage.estimator": "sinkd",
            "bond.sinkhorn": 0.0,
            "bond.forward_kl": 0.0,
            "bond.backward_kl": 1.0,
            "bond.logits_mb": 0.01,
            "ref.model_name_or_path": str(tmp_path / "teacher"),
            "actor.num_gpus_per_node": 2,
            "ds.zero_stage": 3,
            "rollout.n_samples_per_prompt": 4,
            "train.batch_size": 64,
            "train.dynamic_batch_enable": True,
            "data.max_samples": 96,
        },
    )
    steps = sound(done, 6)
    apart = [step["bond/loss"] - step["bond/kl_teacher"] for step in steps]  # the second is of 64 samples
    assert abs(mean(apart)) < 0.25 and max(map(abs, apart)) < 0.8
    assert 0.4 < steps[-1]["bond/kl_teacher"] < steps[0]["bond/kl_teacher"] - 0.2
    assert "bond/kl_ref" in steps[0]


def test_stored_responses_alone_and_beside_the_policys(
    bond: Callable[..., Run], bond_command: Callable[..., Run], tiny: Tiny, tmp_path: Path
) -> None:
    """Their tokens and log-probabilities are in their places: where they were drawn, the trainer finds the same."""
    shutil.copy(Path(__file__).with_name("squared.py"), tmp_path)
    cache = tmp_path / "stored.jsonl"
    offline = {"algo.advantage.estimator": "squared:Offline", "rollout.n_samples_per_prompt": 4}
    offline |= {"train.batch_size": 64, "data.max_samples": 48}
    wanted = with_flags(recipe_for(tiny), {**offline, "cache.output": str(cache), "cache.samples": 8})
    bond_command(tmp_path, "cache", *to_argv(wanted), "--cache.log_probs")

    offline["bond.reward_cache"] = str(cache)
    steps = sound(bond(tmp_path, offline), 3)
    for step in steps:
        assert step["squared/gap"] < 2e-2  # rounding: vLLM on one side, transformers on the other
        assert step["bond/loss"] == pytest.approx(step["squared/before"], rel=1e-2)
        assert step["rollout/generated_tokens"] == 0
        assert "bond/engine_gap_policy" not in step
    assert steps[-1]["bond/kl_ref"] != 0

    beside = {"algo.advantage.estimator": "squared:Beside", "train.batch_size": 16, "rollout.n_samples_per_prompt": 1}
    (tmp_path / "beside").mkdir()
    shutil.copy(tmp_path / "squared.py", tmp_path / "beside")
    steps = sound(bond(tmp_path / "beside", {**offline, **beside}), 3)
    for step in steps:
        assert step["beside/gap"] < 2e-2
        assert step["beside/policy"] == 0
        assert step["reward/stored"] > 0
        assert step["bond/loss"] == pytest.approx(step["beside/nll"], rel=1e-2)


TURNS = '''
from copy import deepcopy

import torch

from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Vowels(AgentInstanceBase):
    """Two turns, each to the next vowel: the sooner the better. Between them the environment says "xyz"."""

    def __init__(self):
        self.turn = 0

    async def reset(self, states, **kwargs):
        return {"observation": states["observation"]}

    async def step(self, states, **kwargs):
        self.turn += 1
        done = self.turn == 2
        reward = torch.tensor(1 / max(1, len(states["action_text"])))
        return {"rewards": reward, "environment_feedback": "" if done else "xyz", "done": done,
                "extra_logs": {"turns": torch.tensor(float(self.turn))}}


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Vowels)

    async def execute(self, prompt, label, sampling_params, *args, **kwargs):
        sampling_params = deepcopy(sampling_params)
        sampling_params.stop_token_ids = [2, 6, 10, 16, 22]  # a e i o u
        return await super().execute(prompt, label, sampling_params, *args, **kwargs)
'''


def test_two_turn_agent_with_muon_prompt_mean_loss_and_resume(bond: Callable[..., Run], tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(TURNS)
    flags = {
        **POOLED,
        "reward.remote_url": None,
        "train.agent_func_path": str(agent),
        "actor.policy_loss_type": "jbond",
        "actor.optim": "muon",
        "actor.muon.lr": 4e-3,
        "bond.eta": 1.0,
        "train.num_episodes": 2,
        "ckpt.save_steps": 3,
        "data.max_samples": 56,  # the last 8 prompts of an episode fill no rollout
        "data.max_len": 48,
    }
    whole = bond(tmp_path / "whole", flags)
    steps = sound(whole, 6)
    cut_back(whole, tmp_path / "resumed", 3)
    resumed = bond(tmp_path / "resumed", {**flags, "ckpt.load_enable": True})
    again = sound(resumed, 6)
    assert again[:3] == steps[:3]
    for step in (*steps, *again):
        assert step["bond/kl_anchor"] == 0
        assert step["bond/ess"] == pytest.approx(1)
        assert 1.5 < step["extra_logs/turns"] <= 2
        assert step["rollout/response_length_mean"] > step["response_length"] - 1e-6
    # Estimated from few tokens, a KL may be of either sign; 0 is what the resumed policy as reference would give.
    assert steps[0]["bond/kl_ref"] == 0
    assert all(abs(step["bond/kl_ref"]) > 1e-4 for step in (steps[1], again[3]))
    later = mean(step["reward/policy"] for step in (*steps[1:], *again[3:]))
    assert later > steps[0]["reward/policy"] - 0.05  # of few samples


MINE = """
from dataclasses import dataclass

from bond_plugin.algorithms.base import flag
from bond_plugin.algorithms.jbond import JBOND, JBONDConfig


@dataclass(frozen=True)
class MineConfig(JBONDConfig):
    mine: float = flag(1.0, "what a run shows as mine/number")


class Mine(JBOND):
    Config = MineConfig

    def advantages(self, batch):
        found = super().advantages(batch)
        found.metrics["mine/number"] = self.config.mine
        return found
"""


def test_import_path_and_a_constant_reward_teaches_nothing(bond: Callable[..., Run], tmp_path: Path) -> None:
    """All samples tie and the policy is its anchor: every advantage is 0, so the policy stays where it is.

    Beside it runs the host's own moving average, which it saves instead of the policy.
    """
    (tmp_path / "mymodule.py").write_text(MINE)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import torch\n\n\ndef reward_func(queries, prompts, labels):\n    return {'rewards': torch.tensor([0.3])}\n"
    )
    done = bond(
        tmp_path,
        {
            **POOLED,
            "algo.advantage.estimator": "mymodule:Mine",
            "bond.mine": 7.0,
            "reward.remote_url": str(reward),
            "train.enable_ema": True,
            "train.colocate_actor_ref": True,
        },
    )
    assert len(done.metrics) == 3
    for step in done.metrics:
        assert step["mine/number"] == 7
        assert step["actor_grad_norm"] < 1e-6
        assert step["bond/kl_anchor"] == step["bond/kl_ref"] == 0
        assert step["bond/win_rate"] == pytest.approx(0.5)
        assert step["bond/ess"] == pytest.approx(1)
    assert (tmp_path / "out" / "model.safetensors").exists()


SEEDED = '''
import zlib
from collections import Counter
from copy import deepcopy

import torch

from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Vowels(AgentInstanceBase):
    def __init__(self):
        pass

    async def step(self, states, **kwargs):
        text = states["action_text"].replace("<eos>", "")
        reward = torch.tensor(sum(letter in "aeiou" for letter in text) / max(1, len(text)))
        return {"rewards": reward, "environment_feedback": "", "done": True}


class AgentExecutor(MultiTurnAgentExecutor):
    """The j-th sample of a prompt is drawn with a seed made of both, whatever the order of calls."""

    def __init__(self):
        super().__init__(Vowels)
        self.seen = Counter()

    async def execute(self, prompt, label, sampling_params, *args, **kwargs):
        sampling_params = deepcopy(sampling_params)
        sampling_params.seed = zlib.crc32(f"{prompt} {self.seen[prompt]}".encode())
        self.seen[prompt] += 1
        return await super().execute(prompt, label, sampling_params, *args, **kwargs)
'''


def test_two_ranks_and_dynamic_batches_give_the_numbers_of_one_rank(bond: Callable[..., Run], tmp_path: Path) -> None:
    """Two steps on the same 16 prompts; samples are drawn by seeds of their own.

    The dynamic batches have the mean over prompts for a loss, whose gradient is the host's times the mean length.
    """
    agent = tmp_path / "agent.py"
    agent.write_text(SEEDED)
    flags = {
        **POOLED,
        "reward.remote_url": None,
        "train.agent_func_path": str(agent),
        "train.num_episodes": 2,
        "data.max_samples": 16,
        "data.max_len": 16,
        "actor.max_norm": 0.0,
        "bond.gamma_ref": 0.1,
    }
    two = {"actor.num_gpus_per_node": 2, "train.micro_batch_size": 4}
    dynamic = {"train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 96, "actor.policy_loss_type": "jbond"}
    one = sound(bond(tmp_path / "one", flags), 2)
    others = [
        sound(bond(tmp_path / "two", {**flags, **two, "ds.zero_stage": 3}), 2),
        sound(bond(tmp_path / "dynamic", {**flags, **two, **dynamic}), 2),
    ]
    for step in others[1]:
        step["actor_grad_norm"] /= step["rollout/response_length_mean"]
    # (What the host shows as policy_loss depends on how it cuts a step.)
    names = ("actor_grad_norm", "reward/policy", "bond/ess", "bond/kl_anchor", "bond/kl_ref", "bond/log_quantile")
    print(json.dumps([[{name: step[name] for name in names} for step in run] for run in (one, *others)], indent=1))
    for other in others:
        for name in names:
            assert other[0][name] == pytest.approx(one[0][name], rel=2e-3, abs=1e-6), name
            # A last bit of the update changes a token here and there.
            assert other[1][name] == pytest.approx(one[1][name], rel=0.1, abs=3e-2), name
    assert one[1]["bond/ess"] < 1
    assert one[1]["bond/kl_anchor"] > 0


def test_samples_of_the_anchor_in_dynamic_batches_on_two_ranks(bond: Callable[..., Run], tmp_path: Path) -> None:
    """Micro-batches by tokens mix policy and anchor up: each row keeps what is its own."""
    done = bond(
        tmp_path,
        {
            "actor.num_gpus_per_node": 2,
            "rollout.n_samples_per_prompt": 2,
            "train.batch_size": 32,
            "train.dynamic_batch_enable": True,
            "train.max_tokens_per_gpu": 64,
        },
    )
    for step in sound(done, 3):
        assert step["bond/engine_gap_policy"] < 2e-2
        assert step["bond/engine_gap_anchor"] < 2e-2
        assert step["rollout/num_samples"] == 32
        assert step["reward"] == pytest.approx(step["reward/policy"], abs=1e-3)  # of the rows that are the policy's
    assert done.metrics[-1]["bond/anchor_policy_gap"] > 4 * done.metrics[-1]["bond/engine_gap_anchor"]


@pytest.mark.parametrize(("flags", "at_reference"), [
    ({"algo.advantage.estimator": "rloo", "ref.update": "ema", "ref.eta": 1.0}, [True] * 4),
    ({"algo.advantage.estimator": "group_norm", "algo.kl.use_loss": True, "algo.kl.estimator": "k3",
      "ref.update": "periodic", "ref.interval": 2, "actor.num_gpus_per_node": 2, "ds.zero_stage": 3},
     [True, False, True, False]),
], ids=["ema", "periodic"])  # fmt: skip
def test_moving_reference_of_the_hosts_estimators(
    bond: Callable[..., Run], tmp_path: Path, flags: dict[str, Any], at_reference: list[bool]
) -> None:
    """The logged KL is to the reference as it stands, and nobody loads a reference model.

    Ray is told of a GPU for each policy rank and for the engine: a group of reference models would wait for ever.
    """
    done = bond(
        tmp_path,
        {
            **flags,
            "algo.kl.init_coef": 0.01,
            "rollout.n_samples_per_prompt": 4,
            "train.batch_size": 64,
            "data.max_samples": 64,
        },
    )
    steps = sound(done, 4)
    assert [abs(step["kl"]) < 1e-6 for step in steps] == at_reference, [step["kl"] for step in steps]
    assert "ReferenceModelActor" not in done.output
