"""Wrong inputs of every kind and command, each with the first line of its error; Ray never starts."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, other_words, recipe_for, to_argv, with_flags, without, written

from bond_plugin.cli.main import main

RLOO = {"algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 2}
GAE = {"algo.advantage.estimator": "gae", "bond.n_anchor_samples": None}
REWARD_MODEL = {"reward.remote_url": None, "reward.num_gpus_per_node": 1}
DATE = '"2024-05-01"'

#: Files that a case names as {folder}/NAME.
FILES: dict[str, str | bytes] = {
    "twice.jsonl": '{"input": "a", "input": "b"}\n',
    "nan.jsonl": '{"input": "a", "x": NaN}\n',
    "huge.jsonl": '{"input": "a", "x": 1e999}\n',
    "long.jsonl": '{"input": "a", "x": 123456789012345678901}\n',
    "half.jsonl": '{"input": "\\ud800"}\n',
    "deep.jsonl": '{"input": "a", "x": ' + "[" * 99 + "]" * 99 + "}\n",
    "deeper.jsonl": "[" * 100_000 + "\n",
    "nul.jsonl": b'{"input": "a\x00"}\n',
    "latin.jsonl": b'{"input": "\xe9"}\n',
    "utf16.jsonl": '{"input": "a"}\n'.encode("utf-16"),
    "empty.jsonl": "\n\n",
    "list.jsonl": '[{"input": "a"}]\n',
    "cut.jsonl": '{"input": "a"}\n{"input": "b',
    "two.jsonl": '{"input": "a"}{"input": "b"}\n',
    "bom.jsonl": b'{"input": "a"}\n\xef\xbb\xbf\xef\xbb\xbf{"input": "b"}\n',
    "text.jsonl": "a\n",
    "other.jsonl": '{"prompt": "a"}\n',
    "none.jsonl": "{}\n",
    "blank.jsonl": '{"input": " \\t"}\n',
    "null.jsonl": '{"input": null}\n',
    "object.jsonl": '{"input": {"a": 1}}\n',
    "true.jsonl": '{"input": true}\n',
    "chat.jsonl": '{"input": [{"role": "user", "content": "a"}]}\n',
    "nochat.jsonl": '{"input": []}\n',
    "role.jsonl": '{"input": [{"role": 1, "content": "a"}]}\n',
    "content.jsonl": '{"input": [{"role": "user", "content": 5}]}\n',
    "dates.jsonl": f'{{"input": {DATE}}}\n' * 2,
    "labels.jsonl": f'{{"input": "a", "label": {DATE}}}\n' * 2,
    "mixed.jsonl": '{"input": "a", "label": 1}\n{"input": "b", "label": "1"}\n',
    "good.jsonl": '{"input": "a"}\n',
    "times.jsonl": f'{{"input": "a", "label": {{"when": [{DATE}], "who": "b"}}}}\n' * 2,
    "large.jsonl": ('{"input": "' + "a" * 10_000 + '"}\n') * 1100 + '{"input": "a", "label": "b"}\n',
    "human.jsonl": '{"input": [{"role": "human", "content": "hello"}]}\n',
    "prompts.txt": "a\n",
    "prompts.json": '{"input": "a"}\n{"input": 1}\n',
    "async.py": "async def reward_func(q, p, l): ...\n",
    "one.py": "def reward_func(q): ...\n",
    "no.py": "x = 1\n",
    "lambda.py": "reward_func = lambda q: 1\n",
    "yields.py": "def reward_func(q, p, l):\n    yield 1\n",
    "inner.py": "def make():\n    def reward_func(q, p, l): ...\n    return reward_func\n",
    "complex.py": "import torch\ndef reward_func(q, p, l):\n    return {'rewards': torch.ones(1) * 1j}\n",
    "exits.py": "import sys\nsys.exit(3)\ndef reward_func(q, p, l): ...\n",
    "syntax.py": "def reward_func(q, p, l)\n",
    "tab.py": "def reward_func(q, p, l):\n\treturn 1\n        return 2\n",
    "raises.py": "def reward_func(q, p, l):\n    raise KeyError('x')\n",
    "import.py": "import no_such_module\ndef reward_func(q, p, l): ...\n",
    "nan.py": "def reward_func(q, p, l):\n    return {'rewards': float('nan')}\n",
    "pair.py": "def reward_func(q, p, l):\n    return {'rewards': [1, 2]}\n",
    "list.py": "def reward_func(q, p, l):\n    return [1.0]\n",
    "logs.py": "def reward_func(q, p, l):\n    return {'rewards': [1.0], 'extra_logs': {'a': 'b'}}\n",
    "key.yaml": "bond: {bta: 1}\n",
    "twice.yaml": "bond: {beta: 1}\nbond.beta: 2\n",
    "list.yaml": "- a\n",
    "open.yaml": "a: [\n",
    "tab.yaml": "bond:\n\tbeta: 1\n",
    "latin.yaml": b"a: \xe9\n",
    "switch.yaml": "train: {colocate_all: 2}\n",
    "many.yaml": "train: {seed: [1, 2]}\n",
    "none.yaml": "",
    "three.yaml": "actor: {adam: {betas: [0.9, 0.9, 0.9]}}\n",
    "bomb.yaml": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 9)),
    "tag.yaml": "a: !!python/name:os.system x\n",
    "cache-text.jsonl": "x\n",
    "cache-nan.jsonl": '{"prompt": "a", "rewards": [NaN]}\n',
    "cache-none.jsonl": "\n",
    "cache-both.jsonl": '{"prompt": "a", "rewards": [1], "reward": 1}\n',
    "cache-version.jsonl": '{"bond_cache": 7}\n',
    "cache-other.jsonl": '{"prompt": "zz", "rewards": [1]}\n',
    "cache-short.jsonl": '{"prompt": "a", "responses": ["x"], "rewards": [1, 2]}\n',
    "metrics-none.jsonl": "{}\n",
    "metrics-bad.jsonl": '{"step": 1}\nx\n{"step": 2}\n',
    "file": "",
}  # fmt: skip
MATRIX = {
    "common": {"actor": {"model_name_or_path": "m"}},
    "evaluation": {"prompts": "{folder}/good.jsonl"},
    "methods": {"jbond": {"flags": {"algo.advantage.estimator": "jbond"}}},
}


def config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tokenizer(name: str, **changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                found.pop(key)
            else:
                found[key] = value
        path.write_text(json.dumps(found))

    return change


def tensors(change: Callable[[str, Any], tuple[str, Any]], **changes: Any) -> Callable[[Path], Any]:
    """What changes each tensor of a model, its name or its numbers, and the configuration."""

    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        save_file(dict(change(*one) for one in load_file(path).items()), path, metadata={"format": "pt"})
        config(**changes)(folder)

    return changed


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
#: Copies of the tiny model that a case names as {folder}/NAME.
MODELS: dict[str, Callable[[Path], Any]] = {
    "m-config": without("config.json"),
    "m-list": written("config.json", b"[]"),
    "m-half": written("config.json", b'{"a": '),
    "m-type": config(model_type="lama"),
    "m-layers": config(num_hidden_layers="two"),
    "m-class": config(architectures=["LlamaForSequenceClassification"]),
    "m-weights": without("model.safetensors"),
    "m-lfs": written("model.safetensors", LFS),
    "m-lfs-config": written("config.json", LFS),
    "m-lfs-tokenizer": written("tokenizer.json", LFS),
    "m-empty": written("model.safetensors", b""),
    "m-header": written("model.safetensors", b"\xff" * 100),
    "m-letters": written("model.safetensors", b"\x05" + b"\0" * 7 + b"abcdefgh"),
    "m-cut": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "m-index": written("model.safetensors.index.json", b'{"weight_map": 3}'),
    "m-part": written("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
    "m-tokenizer": written("tokenizer.json", b'{"version": '),
    "m-no-tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "m-eos": tokenizer("tokenizer_config.json", eos_token=None),
    "m-embeddings": config(vocab_size=1),
    "m-positions": config(max_position_embeddings=31),
    "m-few": config(vocab_size=20),
    "m-small": tensors(lambda name, one: (name, one[:20].clone() if "embed" in name else one), vocab_size=20),
    "m-renamed": tensors(lambda name, one: (f"policy.{name}", one)),
    "m-encoder": config(model_type="bert", architectures=["BertModel"]),
    "m-t5": config(model_type="t5"),
    "m-adapter": written("adapter_config.json", b"{}"),
    "m-parts": lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
    "m-roles": written(
        "chat_template.jinja", b"{% for m in messages if m.role == 'user' %}<u>{{ m.content }}{% endfor %}<a>"
    ),
    "m-words": other_words,
}

BASES = {"RLOO": RLOO, "GAE": GAE, "REWARD_MODEL": REWARD_MODEL}


def filled(value: Any, names: dict[str, Any]) -> Any:
    """``value`` with what stands for a folder or a file in its texts."""
    if isinstance(value, dict):
        return {key: filled(one, names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [filled(one, names) for one in value]
    for name, path in names.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", str(path))
    return value


def make(text: str, folder: Path, tiny: Tiny) -> None:
    """The files that ``text`` names."""
    for name, content in FILES.items():
        if f"{folder}/{name}" in text:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, spoil in MODELS.items():
        if f"{folder}/{name}" in text:
            shutil.copytree(tiny.model, folder / name, dirs_exist_ok=True)
            spoil(folder / name)
    (folder / "broken").symlink_to("/nowhere")
    for name in ("folder.jsonl", "folder.py"):
        (folder / name).mkdir()


def command_line(command: str, given: Any, folder: Path, tiny: Tiny) -> list[str]:
    if command == "bench":
        path = Path(given) if isinstance(given, str) else folder / "matrix.yaml"
        if not isinstance(given, str):
            path.write_text(json.dumps(given))
        return [command, str(path), "--output-dir", str(folder / "out"), "--check"]
    if command == "evaluate":
        base = {"before": tiny.model, "after": tiny.model, "prompts": tiny.prompts, "reward": tiny.reward}
        return [command, *to_argv({**base, "output-dir": folder / "out", **given})]
    base, given = (BASES[given[0]], given[1]) if isinstance(given, list) else ({}, given)
    recipe = [token for name in ("--recipe",) if name in given for token in (name, given[name])]
    if command == "cache":
        base = {"algo.advantage.estimator": "bond", "cache.output": str(folder / "r.jsonl"), **base}
    wanted = with_flags(recipe_for(tiny), {**base, **{key: one for key, one in given.items() if key != "--recipe"}})
    return [command, *to_argv(wanted), *recipe]


def first_line(text: str) -> str:
    """Of what a command printed the first line that says what is wrong."""
    lines = [line for line in text.splitlines() if "error: " in line or line.startswith("  - ")]
    return next(line for line in lines if not line.endswith("this run cannot start:")).strip().removeprefix("- ")


def refused(command: str, given: Any, tiny: Tiny, folder: Path, capfd: Any) -> tuple[int, str]:
    """The status and the first line of the error."""
    import ray

    names = {"folder": folder, "model": tiny.model, "prompts": tiny.prompts, "reward": tiny.reward}
    if command == "bench" and isinstance(given, dict):
        given = {**MATRIX, **given}
    given = filled(given, names)
    make(json.dumps(given, default=str), folder, tiny)
    argv = command_line(command, given, folder, tiny)
    capfd.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    printed = capfd.readouterr()
    assert not ray.is_initialized()
    assert "Traceback" not in printed.out + printed.err, printed.err[-3000:]
    assert status in (1, 2), printed.out[-2000:]
    line = first_line(printed.out + printed.err)
    for name, path in names.items():
        line = line.replace(str(path), f"{{{name}}}")
    return status, line


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOND_DEVICE", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was accepted")

    # What a wrong input that is accepted would come to, so that a test that fails does so at once.
    for name in ("host.launch._runtime_env", "offline.engine.stream", "offline.engine.sample"):
        monkeypatch.setattr(f"bond_plugin.{name}", started)
    monkeypatch.setattr("logging.raiseExceptions", False)  # of handlers that have the stream of another test


#: A case a line: the command, what is given to it, and the first line of the error, which ends with … where Python or
#: a library goes on in its own words.
CASES = [json.loads(line) for line in Path(__file__).with_name("wrong_inputs.jsonl").read_text().splitlines()]


def test_every_command_is_in_the_table() -> None:
    counts = Counter(command for command, _, _ in CASES)
    assert counts["train"] > 180 and min(counts[name] for name in ("cache", "evaluate", "bench")) > 15, counts


@pytest.mark.parametrize(("command", "given", "says"), CASES, ids=lambda value: str(value)[:60])
def test_a_wrong_input_has_one_clear_error(
    command: str, given: Any, says: str, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], on_cpu: None
) -> None:
    status, line = refused(command, given, tiny, tmp_path, capfd)
    assert status == 2
    assert line == says if not says.endswith("…") else line.startswith(says[:-1]), line
