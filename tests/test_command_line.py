"""The command: help, recipes, dry runs, and every error that must come before Ray starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POOLED, REPOSITORY, clean_environment, nested, other_words, recipe_for

from bond_plugin import recipe
from bond_plugin.bench import matrix
from bond_plugin.host import flags as host_flags


def test_help_is_quick_and_imports_neither_torch_nor_the_host() -> None:
    probe = (
        "import sys; from bond_plugin.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'openrlhf', 'ray', 'vllm', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", probe], env=clean_environment(), capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - started)
    assert "bond train" in done.stdout
    assert min(seconds) < 1.0


@pytest.mark.parametrize(("argv", "status", "says"), [
    ([], 0, "usage: bond"),
    (["--version"], 0, "openrlhf-bond 0."),
    (["trian"], 2, "did you mean 'bond train'?"),
])  # fmt: skip
def test_top_level(argv: list[str], status: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bond_plugin", *argv], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_train_help_teaches_the_flags_of_host_and_algorithm(dry: Any) -> None:
    done = dry({"algo.advantage.estimator": "jbond"}, extra=("--help",), base=False)
    assert done.status == 0
    for words in ("--bond.beta", "Jeffreys", "--bond.n_anchor_samples", "--rollout.batch_size", "--recipe", "jbond"):
        assert words in done.text


def test_help_is_the_whole_parsers_and_imports_nothing_for_it(dry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import sys
from bond_plugin.cli.main import main
try:
    main(["train", "--help"])
finally:
    print(*{"torch", "ray", "vllm", "transformers"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(COLUMNS="100"), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr.split() == []
    parsers: list[Any] = []
    monkeypatch.setattr(host_flags, "_limit_choices", parsers.append)
    assert dry({"algo.advantage.estimator": "reinforce"}).status == 0

    def listed(text: str) -> set[str]:
        return set(re.findall(r"^  (--[\w.]+)", text, flags=re.MULTILINE))

    whole = listed(parsers[0].format_help())
    assert len(whole) > 150
    assert listed(done.stdout) == whole


def test_dry_run_prints_configuration_versions_and_hooks(dry: Any) -> None:
    done = dry({"bond.beta": 0.25})
    assert done.status == 0, done.text
    report = yaml.safe_load(done.out[done.out.index("configuration:") :])
    assert report["configuration"]["bond"]["beta"] == 0.25
    assert report["configuration"]["bond"]["eta"] == 0.02
    assert report["configuration"]["actor"]["policy_loss_type"] == "jbond"
    assert report["configuration"]["algo"]["kl"]["init_coef"] == 0.0
    assert report["configuration"]["vllm"]["sync_backend"] == "gloo"  # no GPU
    assert report["versions"]["openrlhf"] == "0.11.2"
    assert report["gpu_slots"] == {"--actor.num_gpus_per_node": 1, "--vllm.num_engines": 1}
    hooks = report["hooks"]
    assert len(hooks) > 25
    owned = [state for target, state in hooks.items() if target.startswith("openrlhf.")]
    assert owned
    assert set(owned) == {"installed", "checked"}
    import ray

    assert not ray.is_initialized()


def test_dry_run_writes_what_it_prints_and_no_secret(dry: Any, tmp_path: Path) -> None:
    found = dry({"logger.wandb.key": "a1b2c3"}, extra=("--json", str(tmp_path / "run.json")))
    assert found.status == 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == yaml.safe_load(found.out[found.out.index("configuration:") :])
    assert written["configuration"]["actor"]["optim"] == "adam"
    assert "a1b2c3" not in found.text + (tmp_path / "run.json").read_text()


def test_a_file_for_the_dry_run_alone(dry: Any) -> None:
    done = dry(base=False, dry_run=False, extra=("--json", "run.json"))
    assert done.status == 2
    error = done.text.splitlines()[-1]  # below the usage
    assert "--json" in error and "--dry-run" in error


def test_the_hosts_own_algorithms_run_through_the_same_command(dry: Any) -> None:
    done = dry({"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 4, "algo.kl.init_coef": 0.1})
    assert done.status == 0, done.text
    report = yaml.safe_load(done.out[done.out.index("configuration:") :])
    assert report["configuration"]["actor"]["policy_loss_type"] == "ppo"
    assert report["configuration"]["algo"]["kl"]["init_coef"] == 0.1


VBON = {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon", "bond.reward_cache": "x"}
REFUSED = [
    ({"train.async_enable": True}, "--train.async_enable cannot be used with jbond"),
    ({"train.async_enable": True, "train.partial_rollout_enable": True}, "--train.partial_rollout_enable"),
    ({"train.enable_ema": True}, "--bond.save_anchor"),
    ({"ds.ring_attn_size": 2}, "--ds.ring_attn_size"),
    ({"ds.tensor_parallel_size": 2, "actor.num_gpus_per_node": 2}, "--ds.tensor_parallel_size"),
    ({"ds.lora.rank": 8}, "--ds.lora.rank"),
    ({"ds.zero_stage": 0}, "--ds.zero_stage cannot be used with jbond"),
    ({"actor.dual_clip": 3.0}, "--actor.dual_clip"),
    ({"actor.entropy_coef": 0.1}, "--actor.entropy_coef"),
    ({"actor.loss_agg_mode": "seq-mean-token-mean"}, "--actor.loss_agg_mode"),
    ({"actor.policy_loss_type": "gspo"}, "--actor.policy_loss_type gspo"),
    ({"algo.advantage.is_correction_level": "token"}, "--algo.advantage.is_correction_level"),
    ({"rollout.top_p": 0.9}, "--rollout.top_p"),
    ({"rollout.n_samples_per_prompt": 2, "algo.dynamic_filtering_enable": True}, "--algo.dynamic_filtering_enable"),
    ({"rollout.vllm_generate_batch_size": 8}, "--rollout.vllm_generate_batch_size"),
    ({"rollout.n_samples_per_prompt": 3}, "--train.batch_size 16 must be a multiple of"),
    ({"rollout.batch_size": 24}, "must be a multiple of --train.batch_size 16"),
    ({"train.micro_batch_size": 12}, "--train.micro_batch_size 12 x 1 data-parallel ranks"),
    ({"rollout.micro_batch_size": 5}, "--rollout.micro_batch_size 5 x 1 data-parallel ranks"),
    ({"rollout.batch_size": 1, "train.batch_size": 1, "train.micro_batch_size": 1, "rollout.micro_batch_size": 1},
     "--bond.baseline batch"),
    ({"rollout.micro_batch_size": 32}, "host's own check of its flags"),
    ({"vllm.num_engines": 0}, "--vllm.num_engines must be at least 1"),
    ({"reward.remote_url": None}, "--reward.remote_url"),
    ({"reward.remote_url": "./missing.py"}, "--reward.remote_url ./missing.py: no such file"),
    ({"actor.model_name_or_path": "./missing"}, "--actor.model_name_or_path ./missing: no such file or folder"),
    ({"data.prompt_dataset": "missing.jsonl"}, "--data.prompt_dataset missing.jsonl: no such file"),
    ({"bond.beta": 1.5}, "--bond.beta must lie in [0, 1]"),
    ({"bond.eta": -0.1}, "--bond.eta must lie in [0, 1]"),
    ({"bond.gamma": "nan"}, "--bond.gamma must be at least 0"),
    ({"bond.n_anchor_samples": 1}, "--bond.n_anchor_samples"),
    ({"bond.baseline": "mean"}, "invalid choice: 'mean'"),
    ({"bond.betta": 0.5}, "unknown flag --bond.betta; did you mean '--bond.beta'?"),
    ({"rollout.batchsize": 8}, "did you mean '--rollout.batch_size'?"),
    ({"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 2, "bond.beta": 0.5},
     "--bond.beta belongs to --algo.advantage.estimator bond and --algo.advantage.estimator jbond"),
    ({"algo.advantage.estimator": "jbonb"}, "invalid choice: 'jbonb'"),
    ({"algo.advantage.estimator": "bond", "bond.n": 1}, "--bond.n must be at least 2"),
    ({"algo.advantage.estimator": "bond", "bond.quantile": "learned"}, "add --no-bond.correction"),
    ({"algo.advantage.estimator": "bond", "bond.baseline": "leave_one_out"}, "n_samples_per_prompt 2 or more"),
    ({"algo.advantage.estimator": "bond", "bond.reward_cache": "missing.jsonl"}, "missing.jsonl: no such file"),
    ({"algo.advantage.estimator": "bon_sft", "bond.kl_coef": -1}, "--bond.kl_coef must be at least 0"),
    ({"reward.transform": "vbon", "bond.reward_cache": "x"},
     "--reward.transform vbon"),
    ({"vbon.n": 4}, "--vbon.n belongs to --reward.transform vbon"),
    ({**VBON, "bond.reward_cache": None}, "make it with `bond cache`"),
    ({**VBON, "vbon.n": 1}, "--vbon.n must be at least 2"),
    ({**VBON, "algo.kl.init_coef": 0.5}, "--algo.kl.init_coef 0.5 contradicts --reward.transform vbon"),
    ({**VBON, "algo.kl.target": 6.0}, "--algo.kl.target cannot be used with --reward.transform vbon"),
    ({**VBON, "algo.kl.use_loss": True}, "--algo.kl.use_loss cannot be used"),
    ({**VBON, "algo.kl.estimator": "k3"}, "--algo.kl.estimator cannot be used"),
    ({**VBON, "rollout.top_p": 0.9}, "--rollout.top_p cannot be used"),
    ({**VBON, "reward.overlong_buffer_len": 5}, "--reward.overlong_buffer_len cannot be used"),
    ({**VBON, "bond.reward_cache": "missing.jsonl"}, "missing.jsonl: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_refused_before_ray_starts_naming_the_flag(dry: Any, flags: dict[str, Any], says: str) -> None:
    done = dry(flags)
    assert done.status == 2, done.text
    assert says in done.text
    assert "Traceback" not in done.text


def test_reward_file_without_reward_func_is_an_error(dry: Any, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def reward(queries):\n    return 0\n")
    done = dry({"reward.remote_url": str(path)})
    assert done.status == 2
    assert "defines no reward_func" in done.text


def configuration(done: Any) -> dict[str, Any]:
    assert done.status == 0, done.text
    return yaml.safe_load(done.out[done.out.index("configuration:") :])["configuration"]


@pytest.mark.parametrize("flags", [
    {"ds.packing_samples": True, "ds.attn_implementation": "eager"},
    {"train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 64},
])  # fmt: skip
def test_packed_samples_run_without_flash_attention_on_cpu(dry: Any, flags: dict[str, Any]) -> None:
    """The host insists on flash attention as soon as samples are packed."""
    done = dry({"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 2, **flags})
    found = configuration(done)
    assert found["ds"]["packing_samples"]
    assert found["ds"]["attn_implementation"] == "sdpa"
    (note,) = (line for line in done.out.splitlines() if line.startswith("bond: note: --ds.attn_implementation"))
    assert "no GPU" in note


def test_an_empty_reward_url_takes_back_that_of_a_recipe(dry: Any, tiny: Any) -> None:
    """The host would call a server without a name; a reward model is what is left."""
    done = dry({
        "reward.remote_url": "", "reward.model_name_or_path": str(tiny.model), "reward.num_nodes": 1,
        "reward.num_gpus_per_node": 1,
    })  # fmt: skip
    assert configuration(done)["reward"]["remote_url"] is None


def test_recipe_is_the_flags_and_the_command_line_wins(dry: Any, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = recipe_for(tiny) | {
        "bond.beta": 0.3,
        "bond.gamma": 1,
        "bond.kl_ref": False,
        "actor.adam.betas": [0.9, 0.999],
        "vllm.enable_prefix_caching": True,
        "reward.clip_range": [-5, 5],
    }
    path.write_text(yaml.safe_dump(nested(content)))
    found = configuration(
        dry(
            {"bond.beta": 0.7},
            extra=("--recipe", str(path), "--bond.kl_ref", "--vllm.enable_prefix_caching=false"),
            base=False,
        )
    )
    assert found["bond"]["beta"] == 0.7
    assert found["bond"]["gamma"] == 1.0
    assert found["bond"]["kl_ref"] is True
    assert found["actor"]["adam"]["betas"] == [0.9, 0.999]
    assert found["reward"]["clip_range"] is None  # set aside, as on the command line
    assert found["vllm"]["enable_prefix_caching"] is False
    assert found["rollout"]["batch_size"] == 16


@pytest.mark.parametrize(("text", "says"), [
    ("bond: {bta: 0.5}", "unknown key 'bond.bta'; did you mean 'bond.beta'?"),
    ("rollout: {batch_sise: 4}", "unknown key 'rollout.batch_sise'; did you mean 'rollout.batch_size'?"),
    ("bond: {beta: 0.5, beta: 0.4}", "'beta' is given twice"),
    ("- a\n- b", "a recipe is a mapping"),
    ("bond: {beta: [", "not valid YAML"),
    ("train: {colocate_all: 3}", "'train.colocate_all' is true or false, got 3"),
])  # fmt: skip
def test_recipe_errors(dry: Any, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    done = dry(extra=("--recipe", str(path)))
    assert done.status == 2
    assert says in done.text


def test_missing_recipe(dry: Any) -> None:
    done = dry(extra=("--recipe", "nowhere.yaml"))
    assert done.status == 2
    assert "--recipe nowhere.yaml: no such file" in done.text


def shipped() -> list[Any]:
    """(text of the file, flags of a run): each recipe, and one cell of each method of each matrix."""
    found = []
    for path in sorted(REPOSITORY.glob("recipes/**/*.yaml")):
        if not path.name.startswith("bench"):
            found.append(pytest.param(path.read_text(), recipe.read(path), id=path.name))
            continue
        cells = {cell.method: cell for cell in matrix.read(path).cells}
        found += [
            pytest.param(path.read_text(), cell.flags, id=f"{path.name}-{name}") for name, cell in cells.items()
        ]
    return found


@pytest.mark.parametrize(("text", "flat"), shipped())
def test_shipped_recipes_and_matrices_are_accepted(
    dry: Any, text: str, flat: dict[str, Any], tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As far as this machine can tell: model, data and device are replaced by ones that are here."""
    monkeypatch.chdir(REPOSITORY)
    assert text.lstrip().startswith("#"), "a recipe opens with how to run it"
    flags = {
        "actor.model_name_or_path": tiny.model,
        "data.prompt_dataset": tiny.prompts,
        "reward.remote_url": tiny.reward,
        "vllm.sync_backend": "gloo",
        "ds.attn_implementation": "sdpa",
    }
    if flat.get("bond.reward_cache"):
        flags["bond.reward_cache"] = tmp_path / "rewards.jsonl"
        prompts = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()]
        stored = {"rewards": list(range(32)), "tokens": [[5, 1]] * 32, "log_probs": [[-1.5, -0.5]] * 32}
        rows = [{"prompt": prompt, **stored} for prompt in sorted(set(prompts))]
        flags["bond.reward_cache"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for model in ("critic.model_name_or_path", "ref.model_name_or_path"):
        if flat.get(model):
            flags[model] = tiny.model
    if flat.get("data.label_key"):
        flags["data.label_key"] = "input"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(nested(flat)))
    done = dry(flags, extra=("--recipe", str(path), "--ds.packing_samples=false"), base=False)
    assert done.status == 0, done.text


def rewarded() -> list[Any]:
    """(reward, flags of a run) from the table of docs/rewards.md."""
    found = []
    for line in (REPOSITORY / "docs" / "rewards.md").read_text().splitlines():
        if "`--recipe" in line:
            names, *sides = (re.findall("`(.*?)`", cell) for cell in line.strip("| ").split(" | "))
            found += [pytest.param(name, flags.split(), id=f"{name}-{flags}") for name in names for (flags,) in sides]
    assert len(found) == 6
    return found


@pytest.mark.parametrize(("name", "flags"), rewarded())
def test_the_rewards_of_the_package_go_with_the_recipes_that_their_page_names(
    dry: Any, name: str, flags: list[str], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    here = {"actor.model_name_or_path": tiny.model, "data.prompt_dataset": tiny.prompts, "vllm.sync_backend": "gloo",
            "ds.attn_implementation": "sdpa", "reward.remote_url": f"recipes/rewards/{name}.py"}  # fmt: skip
    if "maths" in flags[1]:
        here["data.label_key"] = "input"
    done = dry(here, extra=(*flags, "--ds.packing_samples=false"), base=False)
    assert done.status == 0, done.text
    assert "estimator: jbond" in done.text


def test_vbon_sets_the_kl_coefficient_and_takes_the_clip_away(dry: Any, tiny: Any, tmp_path: Path) -> None:
    cache = tmp_path / "rewards.jsonl"
    rows = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()]
    cache.write_text("".join(json.dumps({"prompt": p, "text": "", "reward": 0.5}) + "\n" for p in sorted(set(rows))))
    done = dry({**VBON, "vbon.n": 5, "bond.reward_cache": cache})
    assert done.status == 0, done.text
    report = yaml.safe_load(done.out[done.out.index("configuration:") :])["configuration"]
    assert report["algo"]["kl"]["init_coef"] == 0.25
    assert report["reward"]["clip_range"] is None
    assert report["actor"]["policy_loss_type"] == "ppo"
    assert "does not say which model" in done.out  # the authors' layout has no record


def test_learned_quantile_takes_the_critic_slot(dry: Any, tiny: Any) -> None:
    learned = {"algo.advantage.estimator": "bond", "bond.quantile": "learned"}
    done = dry(learned, extra=("--no-bond.correction",))
    assert done.status == 0, done.text
    report = yaml.safe_load(done.out[done.out.index("configuration:") :])
    assert report["configuration"]["critic"]["model_name_or_path"] == str(tiny.model)
    assert report["gpu_slots"]["--critic.num_gpus_per_node"] == 1
    done = dry({**learned, "critic.num_gpus_per_node": 2}, extra=("--no-bond.correction",))
    assert "as many ranks as the policy" in done.text


def pooled(**flags: Any) -> dict[str, Any]:
    return {**POOLED, **flags}


#: Flags of estimators that J-BOND replaces, or of GPUs, and what the line says of each.
def test_steps_of_evaluation_without_prompts_for_it_are_told(dry: Any) -> None:
    note = "bond: note: --eval.steps 5 evaluates nothing without --eval.dataset"
    assert note in dry(pooled(**{"eval.steps": 5})).text
    assert "evaluates nothing" not in dry(pooled(**{"eval.steps": -1})).text


ASIDE = [
    ({"algo.kl.init_coef": 0.01}, "--algo.kl.init_coef is set aside under jbond"),
    ({"algo.kl.use_loss": True, "algo.kl.estimator": "k3"}, "--algo.kl.use_loss is set aside under jbond"),
    ({"algo.kl.target": 6.0}, "--algo.kl.target is set aside under jbond"),
    ({"reward.normalize_enable": True}, "--reward.normalize_enable is set aside under jbond"),
    ({"algo.advantage.gamma": 0.9}, "--algo.advantage.gamma is set aside under jbond"),
    ({"critic.adam.lr": 9e-6, "critic.num_nodes": 1}, "--critic.adam.lr, --critic.num_nodes: set aside under jbond"),
    ({"ref.num_nodes": 1}, "--ref.num_nodes: set aside under jbond"),
    ({"vllm.sync_backend": "nccl"}, "--vllm.sync_backend nccl is set aside"),
    ({"ds.attn_implementation": "flash_attention_2"}, "--ds.attn_implementation flash_attention_2 is set aside"),
    ({"ds.adam_offload": True}, "--ds.adam_offload True is set aside"),
    ({"train.colocate_all": True, "vllm.enable_sleep": True, "ds.enable_sleep": True}, "--vllm.enable_sleep True is"),
]


@pytest.mark.parametrize(("flags", "says"), ASIDE, ids=lambda v: v if isinstance(v, str) else None)
def test_flags_without_a_meaning_are_set_aside_with_a_line_and_errors_under_strict(
    dry: Any, flags: dict[str, Any], says: str
) -> None:
    done = dry(pooled(**flags))
    assert done.status == 0, done.text
    assert f"bond: note: {says}" in done.text
    strict = dry(pooled(**flags), extra=("--bond.strict",))
    assert strict.status == 2
    assert says in strict.text and "(--bond.strict)" in strict.text


def test_a_pair_of_limits_for_rewards_is_set_aside(dry: Any) -> None:
    done = dry(POOLED, extra=("--reward.clip_range", "-5", "5"))
    assert "note: --reward.clip_range is set aside" in done.text


#: What Algorithm 2 refuses and the pooled form runs.
RAILS = [
    {"train.async_enable": True},
    {"train.async_enable": True, "train.partial_rollout_enable": True},
    {"train.enable_ema": True},
    {"train.dynamic_batch_enable": True},
    {"train.colocate_all": True},
    {"ds.packing_samples": True},
    {"actor.optim": "muon"},
    {"actor.dual_clip": 3.0},
    {"actor.entropy_coef": 0.1},
    {"actor.policy_loss_type": "gspo"},
    {"actor.policy_loss_type": "jbond"},
    {"actor.policy_loss_type": "jbond", "train.dynamic_batch_enable": True},
    {"algo.advantage.is_correction_level": "token"},
    {"algo.dynamic_filtering_enable": True},
    {"actor.loss_agg_mode": "seq-mean-token-mean"},
    {"train.max_epochs": 2, "train.batch_size": 32},
]


@pytest.mark.parametrize("flags", RAILS, ids=str)
def test_the_pooled_form_takes_every_mode_of_the_host(dry: Any, flags: dict[str, Any]) -> None:
    done = dry(pooled(**flags))
    assert done.status == 0, done.text


@pytest.mark.parametrize("flags", [
    {"ds.ring_attn_size": 2, "actor.num_gpus_per_node": 2},
    {"ds.tensor_parallel_size": 2, "actor.num_gpus_per_node": 2},
    {"vllm.tensor_parallel_size": 2},
], ids=str)  # fmt: skip
def test_what_only_a_gpu_can_run_can_be_checked_without_one_but_not_started(dry: Any, flags: dict[str, Any]) -> None:
    (name,) = (name for name in flags if name != "actor.num_gpus_per_node")
    checked = dry(pooled(**flags))
    assert checked.status == 0, checked.text
    assert f"note: this machine cannot run it: --{name} 2 needs a GPU" in checked.text
    meant = dry(pooled(**flags, **{"bond.device": "cpu"}))
    assert meant.status == 2
    assert f"--{name} 2 needs a GPU" in meant.text


REFUSED_POOLED = [
    ({"ds.lora.rank": 8}, "--ds.lora.rank cannot run"),
    ({"actor.optim": "muon", "ds.zero_stage": 3}, "--actor.optim muon with --ds.zero_stage 3 cannot run"),
    ({"rollout.n_samples_per_prompt": 1}, "--rollout.n_samples_per_prompt 1: "),
    ({"bond.n": 6}, "--rollout.n_samples_per_prompt 4: "),
    ({"ds.deepcompile": True}, "--ds.deepcompile cannot be used with jbond"),
    ({"ds.load_in_4bit": True}, "--ds.load_in_4bit cannot be used with jbond"),
    ({"ds.zero_stage": 0}, "--ds.zero_stage cannot be used with jbond"),
    ({"rollout.top_p": 0.9}, "--rollout.top_p cannot be used with jbond"),
    ({"bond.baseline": "leave_one_out"}, "--bond.baseline leave_one_out"),
    ({"ref.update": "ema"}, "--ref.update"),
    ({"ds.zero_stage": 3, "reward.remote_url": None, "reward.model_name_or_path": "x", "reward.num_gpus_per_node": 3},
     "--reward.num_gpus_per_node: "),
    ({"train.agent_func_path": "./missing.py"}, "--train.agent_func_path ./missing.py: no such file"),
    ({"algo.advantage.estimator": "no.such.module:Name"}, "'no.such.module:Name'"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), REFUSED_POOLED, ids=lambda v: v if isinstance(v, str) else None)
def test_what_would_be_a_wrong_run_is_refused(dry: Any, flags: dict[str, Any], says: str) -> None:
    done = dry(pooled(**flags))
    assert done.status == 2, done.text
    assert says in done.text
    assert "Traceback" not in done.text


def test_as_many_samples_as_the_comparison_needs_unless_the_script_says(dry: Any) -> None:
    done = dry({**POOLED, "rollout.n_samples_per_prompt": None, "train.batch_size": 128})
    assert done.status == 0, done.text
    assert "note: --rollout.n_samples_per_prompt is 8" in done.text


MOVING = {"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 4, "algo.kl.init_coef": 0.1}


@pytest.mark.parametrize(("flags", "says"), [
    ({"algo.kl.init_coef": 0.0}, "--ref.update needs --algo.kl.init_coef above 0"),
    ({"ref.eta": 0.0}, "--ref.eta must lie in (0, 1]"),
    ({"ref.update": "periodic", "ref.interval": 0}, "--ref.interval must be at least 1"),
    ({"ds.zero_stage": 0}, "--ds.zero_stage cannot be used with --ref.update"),
])  # fmt: skip
def test_a_moving_reference_that_cannot_be(dry: Any, flags: dict[str, Any], says: str) -> None:
    refused = dry({**MOVING, "ref.update": "ema", **flags})
    assert refused.status == 2
    assert says in refused.text


def test_a_moving_reference_for_the_hosts_estimators(dry: Any) -> None:
    done = dry({**MOVING, "ref.update": "ema"})
    assert done.status == 0, done.text
    still = dry(MOVING)
    moving, fixed = (yaml.safe_load(one.out[one.out.index("configuration:") :]) for one in (done, still))
    assert "--ref.num_gpus_per_node" not in moving["gpu_slots"]  # no reference model is loaded
    assert "--ref.num_gpus_per_node" in fixed["gpu_slots"]


@pytest.fixture
def other_letters(tiny: Any, tmp_path: Path) -> Path:
    """The tiny model with two of its letters exchanged."""
    folder = tmp_path / "other"
    shutil.copytree(tiny.model, folder)
    other_words(folder)
    return folder


def test_another_reference_model_and_a_teacher(dry: Any, tiny: Any, other_letters: Path) -> None:
    model = str(tiny.model)
    taught = {"algo.advantage.estimator": "squared:Taught", "rollout.n_samples_per_prompt": 4, "train.batch_size": 64}
    for flags in ({**MOVING, "ref.model_name_or_path": model}, {**taught, "ref.model_name_or_path": model}):
        done = dry(flags)
        assert done.status == 0, done.text
        assert "--ref.num_gpus_per_node" in yaml.safe_load(done.out[done.out.index("configuration:") :])["gpu_slots"]
    for flags, says in (
        (taught, "learns from a teacher: give --ref.model_name_or_path"),
        (
            {**POOLED, "ref.model_name_or_path": model},
            "has no use here: jbond's KL is to weights of the",
        ),
        ({**MOVING, "ref.update": "ema", "ref.model_name_or_path": model}, "--ref.update makes a reference"),
        ({**MOVING, "algo.kl.init_coef": 0.0, "ref.model_name_or_path": model}, "there is no KL"),
        ({**MOVING, "ref.model_name_or_path": "./gone"}, "--ref.model_name_or_path ./gone: no such file or folder"),
        ({**MOVING, "ref.model_name_or_path": str(other_letters)}, "own tokenizer has another vocabulary"),
    ):
        done = dry(flags)
        assert done.status == 2 and says in done.text, done.text


def test_files_are_meant_from_where_the_command_was_typed(dry: Any, tiny: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tiny.folder)
    done = dry({**POOLED, "data.prompt_dataset": "prompts.jsonl", "reward.remote_url": "reward.py",
                "actor.model_name_or_path": "model", "ckpt.output_dir": "out"})  # fmt: skip
    assert done.status == 0, done.text
    found = yaml.safe_load(done.out[done.out.index("configuration:") :])["configuration"]
    assert found["data"]["prompt_dataset"] == str(tiny.prompts)
    assert found["reward"]["remote_url"] == [str(tiny.reward)]
    assert found["actor"]["model_name_or_path"] == str(tiny.model)
    assert found["ckpt"]["output_dir"] == str(tiny.folder / "out")
