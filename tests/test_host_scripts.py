"""The host's launch scripts with two lines changed: the command, and the estimator."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Run, Tiny, clean_environment, recipe_for, to_argv

SCRIPTS: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / "tests/host_scripts/flags.yaml").read_text())

#: An agent of one turn.
AGENT = '''
import torch

from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Vowels(AgentInstanceBase):
    """One turn, rewarded by its share of vowels."""

    def __init__(self):
        pass

    async def reset(self, states, **kwargs):
        return {"observation": states["observation"]}

    async def step(self, states, **kwargs):
        text = states["action_text"].replace("<eos>", "")
        reward = torch.tensor(sum(letter in "aeiou" for letter in text) / max(1, len(text)))
        return {"rewards": reward, "scores": reward, "environment_feedback": "", "done": True, "extra_logs": {}}


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Vowels)
'''


@pytest.fixture(scope="session")
def agent(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent's file, beside a model with a chat template."""
    path = tmp_path_factory.mktemp("agent") / "agent.py"
    path.write_text(AGENT)
    shutil.copytree(tiny.model, path.with_name("model"))
    (path.with_name("model") / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    return path


def of_script(name: str, tiny: Tiny, agent: Path) -> dict[str, Any]:
    """A script's flags with the estimator, on the tiny model, and prompts as the script wants them."""
    flags = SCRIPTS[name]
    keys = [flags.get("data.input_key", "input"), flags.get("data.label_key", "label")]
    prompts = agent.with_name(f"{name}.jsonl")
    texts = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(dict.fromkeys(keys, text)) + "\n" for text in texts))
    stands = {
        "reward.remote_url": str(tiny.reward),
        "reward.model_name_or_path": str(tiny.model),
        "train.agent_func_path": str(agent),
        "eval.dataset": str(prompts),
    }
    return {
        **flags,
        **{flag: value for flag, value in stands.items() if flag in flags},
        "actor.model_name_or_path": str(agent.with_name("model")),
        "data.prompt_dataset": str(prompts),
        "algo.advantage.estimator": "jbond",
    }


#: The script that draws one response a prompt, of which the pooled form has nothing to compare it with.
ONE_RESPONSE = "train_ppo_ray_hybrid_engine"


def test_one_script_draws_one_response_a_prompt() -> None:
    assert [name for name, flags in SCRIPTS.items() if flags.get("rollout.n_samples_per_prompt") == 1] == [
        ONE_RESPONSE
    ]
    assert len(SCRIPTS) == 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_with_two_lines_changed(
    dry: Callable[..., SimpleNamespace], tiny: Tiny, agent: Path, name: str
) -> None:
    flags = of_script(name, tiny, agent)
    if name == ONE_RESPONSE:
        refused = dry(flags, base=False)
        assert refused.status == 2
        assert "  - --rollout.n_samples_per_prompt 1: " in refused.text
        assert refused.text.count("\n  - ") == 1  # nothing else
        flags["rollout.n_samples_per_prompt"] = 8
    found = dry(flags, base=False)
    assert found.status == 0, found.text
    assert "bond: error" not in found.text
    report = yaml.safe_load(found.out[found.out.index("configuration:") :])
    configuration = report["configuration"]
    # Nothing of the script is lost but what a note names.
    noted = [line for line in found.out.splitlines() if line.startswith("bond: note:")]
    for flag, value in flags.items():
        node: Any = configuration
        for part in flag.split("."):
            node = node[part]
        same = node == value or str(node) == str(value) or (isinstance(node, float) and node == float(value))
        assert same or node == [value] or any(f"--{flag}" in line for line in noted), (flag, value, node)
    # No reference model, no critic: the anchor is kept by the policy's workers.
    assert configuration["algo"]["kl"]["init_coef"] == 0
    assert configuration["critic"]["model_name_or_path"] is None
    assert "--ref.num_gpus_per_node" not in report["gpu_slots"]
    assert configuration["actor"]["policy_loss_type"] == "ppo"


ALL = """
import json, sys
from bond_plugin.cli.main import main

given, out = sys.argv[1:]  # the host's are put there
status = {}
for name, argv in json.load(open(given)).items():
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {name}", file=stream, flush=True)
    try:
        status[name] = main(["train", *argv]) or 0
    except SystemExit as stop:
        status[name] = stop.code or 0
json.dump(status, open(out, "w"))
"""
STARTED = "started and not only checked"


@pytest.fixture(scope="module")
def for_gpus(tiny: Tiny, agent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """The scripts, each checked as it would run on GPUs (all in one process), and before them a run that is started.

    By name: ``status``, ``out`` and ``err``.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    folder = tmp_path_factory.mktemp("for_gpus")
    given, out = folder / "given.json", folder / "out.json"
    device = {"bond.device": "cuda"}
    enough = {"rollout.n_samples_per_prompt": 8, **device, "dry-run": True}
    flags = {STARTED: {**recipe_for(tiny), **device}}
    flags |= {name: {**of_script(name, tiny, agent), **enough} for name in SCRIPTS}
    given.write_text(json.dumps({name: to_argv(one) for name, one in flags.items()}))
    command = [sys.executable, "-c", ALL, str(given), str(out)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    status = json.loads(out.read_text())
    said = [
        {part.partition("\n")[0]: part for part in stream.split("=== ")[1:]} for stream in (done.stdout, done.stderr)
    ]
    return {name: SimpleNamespace(status=status[name], out=said[0][name], err=said[1][name]) for name in flags}


def test_a_run_for_gpus_needs_flash_attention(for_gpus: dict[str, SimpleNamespace]) -> None:
    done = for_gpus[STARTED]
    assert done.status == 2
    assert "flash-attn is not installed" in done.err
    assert "--bond.device cpu" in done.err
    assert "Traceback" not in done.err


def test_scripts_are_checked_for_gpus_on_a_machine_without(for_gpus: dict[str, SimpleNamespace]) -> None:
    """As they would run on GPUs: nothing is set aside for want of one, and flash-attn alone is missed."""
    assert sum(done.out.count("bond: note: this machine has no flash-attn") for done in for_gpus.values()) == 1
    for name in SCRIPTS:
        done = for_gpus[name]
        assert done.status == 0, done.err
        assert "no GPU" not in done.out
        report = yaml.safe_load(done.out[done.out.index("configuration:") :])
        assert set(report["hooks"].values()) == {"installed", "checked"}
        configuration = report["configuration"]
        assert configuration["bond"]["device"] == "cuda"
        for flag in ("vllm.enable_sleep", "ds.enable_sleep", "ds.adam_offload", "ds.ring_attn_size",
                     "vllm.tensor_parallel_size", "vllm.sync_backend"):  # fmt: skip
            group, _, rest = flag.partition(".")
            if flag in SCRIPTS[name]:
                assert configuration[group][rest] == SCRIPTS[name][flag], (name, flag)
        packed = configuration["ds"]["packing_samples"]
        assert configuration["ds"]["attn_implementation"] == ("flash_attention_2" if packed else "eager")


#: Sizes of the tiny model and of a machine without GPU; two steps.
SMALL = {
    "actor.adam.lr": 2e-3,
    "actor.lr_warmup_ratio": 0.0,
    "actor.num_gpus_per_node": 2,
    "ckpt.load_enable": False,
    "data.max_len": 24,
    "data.max_samples": 22,  # six to replace what dynamic filtering drops
    "rollout.batch_size": 8,
    "rollout.max_new_tokens": 10,
    "rollout.micro_batch_size": 8,
    "rollout.n_samples_per_prompt": 4,
    "train.batch_size": 32,
    "train.micro_batch_size": 4,
    "vllm.num_engines": 2,
    "vllm.tensor_parallel_size": 1,
}
#: Scripts that run without GPU, and what else they need there.
RUN = {
    "train_dapo_ray_hybrid_engine": {},
    "train_ppo_ray_hybrid_engine": {"train.max_tokens_per_gpu": 64, "reward.num_gpus_per_node": 2},
    "train_reinforce_baseline_ray_agent_async": {
        "actor.num_gpus_per_node": 1,
        "vllm.num_engines": 1,
        "ds.ring_attn_size": 1,
        "train.max_tokens_per_gpu": 64,
        "rollout.max_tokens_per_gpu": 128,
    },
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", RUN)
def test_a_script_trains(bond: Callable[..., Run], tiny: Tiny, agent: Path, tmp_path: Path, name: str) -> None:
    script = of_script(name, tiny, agent)
    flags = {flag: None for flag in recipe_for(tiny)} | script | SMALL | RUN[name]
    folders = {"ckpt.output_dir": str(tmp_path / "out"), "ckpt.path": str(tmp_path / "ckpt")}
    done = bond(tmp_path, {**flags, **folders})
    assert [step["step"] for step in done.metrics] == [1, 2]
    for step in done.metrics:
        assert all(math.isfinite(value) for value in step.values())
        assert step["rollout/num_samples"] == 32
        assert step["actor_grad_norm"] > 0
        assert 0 < step["bond/win_rate"] < 1
        assert 0.2 < step["bond/ess"] <= 1 + 1e-9
    first, last = done.metrics
    assert first["bond/kl_anchor"] == 0  # one and the same weights
    assert first["bond/kl_ref"] == pytest.approx(0, abs=5e-3)  # a row of four rounds otherwise than with the three
    # Estimated from few tokens, a KL may come out below zero; it is zero only where nothing was learned.
    assert last["bond/kl_ref"] != 0 or "train.async_enable" in script
    assert (tmp_path / "out" / "model.safetensors").exists()
