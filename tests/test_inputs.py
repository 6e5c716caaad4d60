"""Inputs that are wrong in ordinary ways are refused by name before Ray starts."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Tiny, without, written

from bond_plugin.files import lock
from bond_plugin.host import flags as flags_module
from bond_plugin.host import identity, inputs, launch
from bond_plugin.offline import fingerprints

BELOW_ONE, BELOW_ZERO, SHARES = (
    inputs.RANGES[must][1].split() for must in ("be at least 1", "be at least 0", "be from 0 to 1")
)
BELOW_ZERO.remove("actor.eps_clip_low_high")  # which takes two
FLOATS = [*(dest for dest in BELOW_ZERO if dest.split(".")[0] in ("actor", "algo")), *SHARES, "ckpt.max_mem"]


@pytest.mark.parametrize(
    ("dest", "value", "says"),
    [
        *((dest, 0, f"--{dest} must be at least 1, got 0") for dest in BELOW_ONE),
        *((dest, -1, f"--{dest} must be at least 0, got -1") for dest in BELOW_ZERO),
        *((dest, 1.5, f"--{dest} must be from 0 to 1, got 1.5") for dest in SHARES),
        *((dest, "nan", f"--{dest} must be ") for dest in FLOATS),
        ("actor.dual_clip", "nan", "--actor.dual_clip is not a number: nan"),
        ("reward.clip_range", ["nan", "1"], "--reward.clip_range is not a number"),
        ("actor.adam.betas", ["0.9", "1.0"], "--actor.adam.betas must lie in [0, 1), got 0.9 1.0"),
        ("ds.zero_stage", 4, "--ds.zero_stage must be from 0 to 3, got 4"),
        ("rollout.temperature", 0, "--rollout.temperature must be above 0, got 0.0"),
        ("vllm.gpu_memory_utilization", 0, "--vllm.gpu_memory_utilization must be above 0, got 0.0"),
        ("reward.timeout", -1, "--reward.timeout must be above 0, got -1.0"),
        ("ckpt.save_steps", 0, "--ckpt.save_steps must be at least 1, or -1 for never, got 0"),
        ("eval.steps", -2, "--eval.steps must be at least 1, or -1 for never, got -2"),
        ("data.max_len", 10, "--data.max_len 10 leaves no room for a prompt before --rollout.max_new_tokens 10"),
    ],
)
def test_a_number_that_makes_no_sense(dry: Callable[..., Any], dest: str, value: Any, says: str) -> None:
    found = dry({dest: value})
    assert found.status == 2 and f"  - {says}" in found.text, found.text[-2000:]
    assert "Traceback" not in found.text


TABLES = {
    "good": ([{"input": letter} for letter in "abcdefghijklmnopqrst"], None),
    "null": ([{"input": "a"}] * 19 + [{"input": None}], "row 20 has no text under 'input', but None"),
    "numbers": ([{"input": 3}] * 20, "row 1 has no text under 'input', but 3"),
    "no key": ([{"prompt": "a"}] * 20, "row 1 has no key 'input' (it has 'prompt'): set --data.input_key"),
    "empty": ([{"input": "a"}, {"input": " "}], "row 2 has an empty 'input'"),
}


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
@pytest.mark.parametrize(("rows", "says"), TABLES.values(), ids=TABLES)
def test_tables_of_prompts(dry: Callable[..., Any], tmp_path: Path, kind: str, rows: list[dict], says: str) -> None:
    import pandas

    if kind == "csv" and rows[-1] == {"input": " "}:
        says = None  # which is no row in its readers
    path, table = tmp_path / f"prompts.{kind}", pandas.DataFrame(rows)
    if kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_text(json.dumps(rows))
    found = dry({"data.prompt_dataset": path})
    assert found.status == (2 if says else 0), found.text[-2000:]
    if says:
        assert "Traceback" not in found.text.partition("cannot start")[2]
        assert f"--data.prompt_dataset {path}, {says}" in found.text, found.text[-2000:]
    else:
        assert "--data.prompt_dataset" not in found.text  # all of it was looked at


def test_a_table_that_is_none(dry: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_text("input")
    found = dry({"data.prompt_dataset": path})
    assert found.status == 2 and f"--data.prompt_dataset {path}: " in found.text and "Traceback" not in found.text


LINES = {
    "empty file": ("", "is empty: it needs a line for each prompt"),
    "no JSON": ('{"input": "a"}\n{"input": \n', "line 2 is not JSON"),
    "no object": ('{"input": "a"}\n["a"]\n', "line 2 is no JSON object: ['a']"),
    "no key": (
        '{"input": "a"}\n{"prompt": "b"}\n',
        "line 2 has no key 'input' (it has 'prompt'): set --data.input_key",
    ),
    "empty prompt": ('{"input": ""}\n', "line 1 has an empty 'input'"),
    "blank prompt": ('{"input": " \\n"}\n', "line 1 has an empty 'input'"),
    "null": ('{"input": "a"}\n\n{"input": null}\n', "line 3 has no text under 'input', but None"),
    "number": ('{"input": 3}\n', "line 1 has no text under 'input', but 3"),
    "conversation": (
        '{"input": [{"role": "user", "content": "a"}]}\n',
        "line 1 has a conversation under 'input': set --data.apply_chat_template",
    ),
    "many": ('{"input": 1}\n' * 9, "and 4 more lines"),
}


@pytest.mark.parametrize("name", LINES)
def test_prompts_that_are_no_use(dry: Callable[..., Any], tmp_path: Path, name: str) -> None:
    content, says = LINES[name]
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    for dest in ("data.prompt_dataset", "eval.dataset"):
        found = dry({dest: str(path)})
        assert found.status == 2 and f"--{dest} {path}" in found.text and says in found.text, found.text[-2000:]


def test_prompts_in_another_encoding_without_labels_and_twice(dry: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"input": "größer"}\n'.encode("latin-1"))
    assert f"{path}, line 1 is not UTF-8" in dry({"data.prompt_dataset": str(path)}).text
    path.write_text('{"input": "a", "label": 1}\n{"input": "b"}\n')
    found = dry({"data.prompt_dataset": str(path), "data.label_key": "label"})
    assert f"{path}, line 2 has no key 'label' (it has 'input'): set --data.label_key" in found.text
    path.write_bytes(b"\xef\xbb\xbf" + b'{"input": "a"}\n{"input": "b"}\n{"input": "a"}\n')
    found = dry({"data.prompt_dataset": str(path)})
    assert found.status == 0 and f"{path}: 1 of 2 prompts are there more than once" in found.text
    few = "3 prompts are fewer than --rollout.batch_size"
    assert re.search(rf"{few} \d+: no step is taken", found.text)
    found = dry({"data.prompt_dataset": str(path), "train.batch_size": 2, "train.micro_batch_size": 2})
    assert re.search(rf"{few} \d+: a step has no more than these", found.text)


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (without("config.json"), "it has no config.json; is it a model's folder?"),
    "config cut": (written("config.json", b'{"a": '), "config.json is not JSON"),
    "no weights": (without("model.safetensors"), "it has no weights"),
    "weights cut": (_cut, "model.safetensors is cut short"),
    "no header": (written("model.safetensors", b"\x05" + b"\0" * 7 + b"abcdefgh"), "has no header of safetensors"),
    "empty": (written("model.safetensors", b""), "model.safetensors is cut short (0 bytes)"),
    "Git LFS": (written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
    "a part is missing": (
        written("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "model-00001-of-00002.safetensors is missing",
    ),
    "positions": (_positions, "--data.max_len 32 is more than the 16 positions of"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_folder_that_is_not_whole(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path, name: str) -> None:
    spoil, says = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    spoil(folder)
    found = dry({"actor.model_name_or_path": str(folder)})
    assert found.status == 2 and says in found.text, found.text[-2000:]


def test_weights_of_another_kind_beside_whole_ones_are_not_looked_at(
    dry: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    found = dry({"actor.model_name_or_path": str(folder)})
    assert found.status == 0, found.text


def test_no_tokenizer_and_no_chat_template(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    found = dry({"data.apply_chat_template": True})
    assert found.status == 2 and f"the tokenizer of {tiny.model} has no chat template" in found.text
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    found = dry({"actor.model_name_or_path": str(folder)})
    assert found.status == 2 and "it has no tokenizer" in found.text


def test_output_where_nothing_can_be_written(dry: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = dry({"ckpt.output_dir": str(tmp_path / "file" / "out")})
    assert found.status == 2 and "a file is where the folder should be" in found.text
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    found = dry({"ckpt.path": str(tmp_path / "closed" / "ckpt")})
    assert found.status == 2 and "nothing can be written into this folder" in found.text


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_locks", [])
    folders = {"output_dir": str(tmp_path / "out"), "path": str(tmp_path / "ckpt"), "load_enable": False}
    ckpt = SimpleNamespace(**folders, save_steps=-1, save_on_stop=False)
    args = SimpleNamespace(ckpt=ckpt, eval=SimpleNamespace(dataset=None))
    with lock(tmp_path / "ckpt"):
        assert launch._lock(args) == []  # no checkpoint is read or written
    launch._locks.clear()
    args.ckpt.save_steps = 10
    with lock(tmp_path / "ckpt"):
        (problem,) = launch._lock(args)
    assert f"--ckpt.path: process {os.getpid()} on " in problem and f"writes to {tmp_path / 'ckpt'}" in problem
    launch._locks.clear()
    args.ckpt.path = args.ckpt.output_dir  # one folder for both is no second run
    assert launch._lock(args) == []
    launch._locks.clear()
    args.ckpt.output_dir = "/proc/nowhere"
    assert launch._lock(args)[0].startswith("--ckpt.output_dir /proc/nowhere: ")


def test_resuming_where_nothing_is(dry: Callable[..., Any], tmp_path: Path) -> None:
    flags = {"ckpt.load_enable": True, "ckpt.path": str(tmp_path / "ckpt")}
    found = dry(flags)
    assert found.status == 0 and f"--ckpt.load_enable: {tmp_path / 'ckpt'} holds no whole checkpoint" in found.text
    found = dry({**flags, "bond.require_checkpoint": True})
    assert found.status == 2 and "--bond.require_checkpoint: --ckpt.path" in found.text
    assert dry({"bond.require_checkpoint": True}).status == 2
    (tmp_path / "ckpt" / "_actor").mkdir(parents=True)
    (tmp_path / "ckpt" / "_actor" / "latest").write_text("global_step1")
    found = dry({**flags, "bond.require_checkpoint": True})
    assert found.status == 2 and "latest names global_step1, which is not there" in found.text
    (tmp_path / "ckpt" / "_actor" / "global_step1").mkdir()
    assert dry({**flags, "bond.require_checkpoint": True}).status == 0


REWARDS = {
    "a BOM": (b"\xef\xbb\xbfdef reward_func(queries, prompts, labels): ...\n", None),
    "a coding line": (
        "# -*- coding: gbk -*-\n# \u5956\u52b1\ndef reward_func(q, p, l): ...\n".encode("gbk"),
        None,
    ),
    "in try": (b"try:\n    from fast import reward_func\nexcept ImportError:\n    def reward_func(*a): ...\n", None),
    "star": (b"from somewhere import *\n", None),
    "assigned": (b"from functools import partial\nreward_func = partial(print, 1)\n", None),
    "by name": (b"globals()['reward_func'] = print\n", None),
    "a class": (b"class reward_func:\n    def __new__(cls, q, p, l): ...\n", None),
    "defaults": (b"def reward_func(q, p, l, scale=1.0): ...\n", None),
    "decorated": (b"@one_by_one\ndef reward_func(query, label): ...\n", None),
    "set from inside": (b"def make():\n    global reward_func\n    def reward_func(q, p, l): ...\nmake()\n", None),
    "async": (b"async def reward_func(q, p, l): ...\n", "reward_func is async"),
    "two arguments": (b"def reward_func(queries, prompts): ...\n", "must take three arguments"),
    "four arguments": (b"def reward_func(q, p, l, more): ...\n", "must take three arguments"),
    "only by keyword": (b"def reward_func(q, p, l, *, more): ...\n", "must take three arguments"),
    "none": (b"def reward(q, p, l): ...\n", "it defines no reward_func"),
    "no Python": (b"def reward_func(:\n", "invalid syntax"),
    "a null byte": (b"def reward_func(q, p, l): ...\n\0", "null bytes"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_file_is_judged_by_what_python_would_see(tmp_path: Path, name: str) -> None:
    content, says = REWARDS[name]
    path = tmp_path / "reward.py"
    path.write_bytes(content)
    found = list(inputs.reward(str(path)))
    assert found == [] if says is None else says in found[0], found


@pytest.mark.parametrize("url", ["localhost:5000/score", "127.0.0.1:80", "reward"])
def test_a_server_without_its_scheme(dry: Callable[..., Any], url: str) -> None:
    found = dry({"reward.remote_url": url})
    assert found.status == 2 and f"--reward.remote_url {url}: is neither a Python file" in found.text


def test_columns_have_values_of_one_kind_in_all_files(dry: Callable[..., Any], tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"input": "a", "answer": "0"}\n{"input": "b", "answer": null}\n')
    second.write_text('{"input": "c", "answer": 0.5}\n{"input": "d", "answer": 1}\n')
    both = {"data.prompt_dataset": f"{first},{second}", "data.prompt_probs": "0.5,0.5"}
    text = dry(both).text
    assert f"{second}, line 1 has a number under 'answer', and {first}, line 1 has a text" in text
    assert dry({"data.prompt_dataset": str(second)}).status == 0


def test_conversations_that_the_chat_template_refuses(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + "{{ messages[-1]['content'] }}")
    path = tmp_path / "prompts.jsonl"
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    path.write_text("".join(json.dumps({"input": chat}) + "\n" for chat in ([user], [user, user], [system, user])))
    flags = {"actor.model_name_or_path": str(folder), "data.apply_chat_template": True}
    found = dry({**flags, "data.prompt_dataset": str(path)})
    assert f"{path}, line 3 does not fit the tokenizer's chat template (roles: system, user): no system" in found.text
    assert "line 1 " not in found.text and "line 2 " not in found.text
    path.write_text(json.dumps({"input": [{"content": "a"}]}) + "\n")
    assert (
        "line 1 has a message under 'input' without 'role'" in dry({**flags, "data.prompt_dataset": str(path)}).text
    )


def test_checkpoints_of_another_run(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "ckpt"
    shutil.copy(tiny.prompts, prompts)
    flags = {"ckpt.load_enable": True, "ckpt.path": str(folder), "data.prompt_dataset": str(prompts)}
    (folder / "_actor" / "global_step1").mkdir(parents=True)
    (folder / "_actor" / "latest").write_text("global_step1")
    assert dry(flags).status == 0
    args = flags_module.current().args
    identity.write(args, identity.of(args))
    assert "--ckpt.load_enable" not in dry({**flags, "train.num_episodes": 9}).text
    told = dry({**flags, "bond.gamma": 0.5})
    assert told.status == 0 and "--ckpt.load_enable: --bond.gamma was 0.0 and is 0.5" in told.text
    seed = dry({**flags, "train.seed": 7})
    assert seed.status == 2 and "--train.seed was 42 and is 7" in seed.text and "are another run's" in seed.text
    prompts.write_text('{"input": "zyx"}\n' * 48)
    other = dry(flags)
    assert other.status == 2 and f"{prompts} has another content" in other.text
    (folder / "bond_run.json").unlink()
    assert dry(flags).status == 0


def test_resuming_reads_the_prompts_once(
    dry: Callable[..., Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"ckpt.path": str(tmp_path / "ckpt"), "ckpt.output_dir": str(tmp_path / "out")}
    assert dry({**folders, "ckpt.load_enable": True}).status == 0
    run = flags_module.current()
    run.dry_run = False
    read = []

    def of_file(path: Any) -> str:
        read.append(str(path))
        return "0"

    monkeypatch.setattr(fingerprints, "of_file", of_file)
    for _ in range(2):
        launch._before_ray(run)
        launch._locks.clear()
    assert read.count(str(tiny.prompts)) == 2  # the second time there was a run to compare with


def test_a_checkpoint_of_other_ranks_is_refused_before_the_start(dry: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "_actor" / "global_step1"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step1")
    for rank in range(2):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    found = dry({"ckpt.load_enable": True, "ckpt.path": str(tmp_path)})
    assert found.status == 2
    assert "was written by 2 ranks, and this run has 1: add --ds.use_universal_ckpt, and convert it" in found.text


def test_nothing_to_save_on_stop(dry: Callable[..., Any]) -> None:
    assert dry({"ckpt.save_on_stop": True}).status == 0
    found = dry({"ckpt.save_on_stop": True, "ckpt.disable_ds": True})
    assert found.status == 2 and "--ckpt.save_on_stop cannot be used with --ckpt.disable_ds" in found.text


def test_of_a_recipe_what_the_command_line_replaces_is_set_aside(dry: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("algo: {advantage: {estimator: jbond}}\nbond: {beta: 0.5, eta: 0.1}\n")
    rloo = {"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 4, "train.batch_size": 64}
    found = dry(rloo, extra=("--recipe", str(recipe)))
    assert found.status == 0, found.text
    assert "of the recipe --bond.beta, --bond.eta are set aside" in found.text
    recipe.write_text("algo: {advantage: {estimator: jbond}}\nbond: {bta: 0.5}\n")
    assert "unknown key 'bond.bta'" in dry(rloo, extra=("--recipe", str(recipe))).text
    recipe.write_text("reward: {transform: vbon}\nvbon: {n: 4}\n")
    found = dry(extra=("--recipe", str(recipe)))
    assert found.status == 0, found.text
    assert "of the recipe --vbon.n, --reward.transform are set aside" in found.text


def test_a_list_for_a_flag_of_several_values_in_one_word(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{prompt_dataset: [{tiny.prompts}, {tiny.prompts}], prompt_probs: [0.5, 0.5]}}\n")
    found = dry({"data.prompt_dataset": None}, extra=("--recipe", str(recipe)))
    assert found.status == 0 and f"prompt_dataset: {tiny.prompts},{tiny.prompts}" in found.out, found.text
    assert "prompt_probs: 0.5,0.5" in found.out


def test_a_reward_model_without_a_head_is_told(dry: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    judge = tmp_path / "judge"
    shutil.copytree(tiny.model, judge)
    flags = {"reward.remote_url": None, "reward.model_name_or_path": judge}
    found = dry(flags)
    assert found.status == 0
    assert (
        f"note: --reward.model_name_or_path {judge} has no score.weight: the host makes one of random" in found.text
    )
    weights = load_file(judge / "model.safetensors")
    save_file({**weights, "head.score.weight": torch.zeros(1, 4)}, judge / "model.safetensors")
    assert "random" not in dry(flags).text
    assert "has no value.weight" in dry({**flags, "ds.value_head_prefix": "value"}).text
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "value_head_prefix": "score"}))
    assert "random" not in dry({**flags, "ds.value_head_prefix": "value"}).text


def test_files_are_meant_relative_to_where_the_command_is_typed(
    dry: Callable[..., Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(tiny.prompts, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given = {"data.prompt_dataset": "a.jsonl@train, b.jsonl", "data.prompt_probs": "0.5,0.5", "ckpt.path": "new/ckpt"}
    assert dry(given).status == 0
    args = flags_module.current().args
    assert args.data.prompt_dataset == f"{tmp_path}/a.jsonl@train,{tmp_path}/b.jsonl"
    assert args.ckpt.path == f"{tmp_path}/new/ckpt"
    assert args.actor.model_name_or_path == str(tiny.model)
