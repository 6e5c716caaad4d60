"""What can be seen of a run's inputs without starting it: numbers in their range, a model's files, the prompts.

Hub names, servers and tables other than JSON lines are not looked at.
"""

from __future__ import annotations

import ast
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.offline.prompts import Columns, Lines, chat_template, tokenizer_of

_INFINITY = math.inf
#: Flags of the host, by the least and the largest value that make sense.
_RANGES: dict[tuple[float, float], str] = {
    (1, _INFINITY): "actor.num_nodes actor.num_gpus_per_node critic.num_nodes critic.num_gpus_per_node ref.num_nodes "
    "ref.num_gpus_per_node reward.num_nodes reward.num_gpus_per_node vllm.tensor_parallel_size ds.ring_attn_size "
    "ds.tensor_parallel_size train.batch_size train.micro_batch_size train.max_epochs train.num_episodes "
    "train.max_tokens_per_gpu train.async_queue_size rollout.batch_size rollout.micro_batch_size "
    "rollout.vllm_generate_batch_size rollout.max_tokens_per_gpu rollout.max_new_tokens rollout.n_samples_per_prompt "
    "data.max_len data.max_samples logger.logging_steps ckpt.max_num eval.n_samples_per_prompt",
    (0, _INFINITY): "vllm.num_engines actor.adam.lr critic.adam.lr actor.adam.eps critic.adam.eps actor.max_norm "
    "critic.max_norm actor.adam.weight_decay critic.adam.weight_decay actor.eps_clip critic.value_clip "
    "algo.kl.init_coef ds.lora.rank eval.temperature data.max_images_per_prompt",
    (0, 1): "rollout.top_p algo.advantage.gamma algo.advantage.lambd actor.lr_warmup_ratio critic.lr_warmup_ratio "
    "actor.min_lr_ratio critic.min_lr_ratio train.ema_beta vllm.gpu_memory_utilization ds.lora.dropout",
    (0, 3): "ds.zero_stage",
}
_ABOVE_ZERO = (
    "rollout.temperature",
    "rollout.top_p",
    "ckpt.max_mem",
    "vllm.gpu_memory_utilization",
    "reward.timeout",
)
_STEPS = ("eval.steps", "ckpt.save_steps")  # -1 for never
_MOST_BYTES = 2**28  # of a file of prompts that are read
_SHOWN = 5  # faulty lines of a file that are named


def import_folders(files: Iterable[str]) -> list[str]:
    """From where the user's Python files (rewards, agents) import their neighbours: their folders and this one."""
    folders = [os.path.dirname(os.path.abspath(file)) for file in files if file.endswith(".py")]
    return list(dict.fromkeys([os.getcwd(), *folders]))


def problems(args: SimpleNamespace) -> tuple[list[str], list[str]]:
    """Everything that is wrong with the files of a run, each with the flag; and notes."""
    found, notes = [], []
    for dest in ("actor", "critic", "reward"):
        for name in (getattr(args, dest).model_name_or_path or "").split(","):
            if name and Path(name).is_dir():
                found += [f"--{dest}.model_name_or_path {name}: {line}" for line in _model(Path(name))]
    if args.actor.model_name_or_path and Path(args.actor.model_name_or_path).is_dir():
        found += _policy(args, Path(args.actor.model_name_or_path))
    template = _template(args) if not found else None
    for dest in ("data.prompt_dataset", "eval.dataset"):
        wrong, seen = _prompts(args, dest, template)
        found, notes = found + wrong, notes + seen
    for dest in ("ckpt.output_dir", "ckpt.path"):
        found += [f"--{dest} {line}" for line in _folder(Path(_value(args, dest)))]
    return found, notes


def _template(args: SimpleNamespace) -> Callable[[list], str] | None:
    """The chat template of a tokenizer that is here, if the run wants it."""
    if not args.data.apply_chat_template or not Path(args.actor.model_name_or_path or "").is_dir():
        return None
    return chat_template(tokenizer_of(args))


def _value(args: SimpleNamespace, dest: str) -> Any:
    for part in dest.split("."):
        args = getattr(args, part, None)
    return args


def numbers(args: SimpleNamespace, given: frozenset[str]) -> Iterator[str]:
    """Numbers that make no sense, each with the flag.

    Args:
        args: the run's, before the host divides by any of them.
        given: the destinations of the flags that the user gave.
    """
    for (low, high), dests in _RANGES.items():
        for dest in dests.split():
            value = _value(args, dest)
            if value is None or low <= value <= high:
                continue
            bound = f"at least {low}" if high == _INFINITY else f"from {low} to {high}"
            yield f"--{dest} must be {bound}, got {value}"
    for dest in _ABOVE_ZERO:
        value = _value(args, dest)
        if value is not None and not value > 0:
            yield f"--{dest} must be above 0, got {value}"
    for dest in _STEPS:
        value = _value(args, dest)
        if value is not None and value < 1 and value != -1:
            yield f"--{dest} must be at least 1, or -1 for never, got {value}"
    for dest in ("actor.adam.betas", "critic.adam.betas"):
        if not all(0 <= beta < 1 for beta in _value(args, dest)):
            yield f"--{dest} must lie in [0, 1), got {' '.join(map(str, _value(args, dest)))}"
    for dest in sorted(given):
        value = _value(args, dest)
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(one, float) and math.isnan(one) for one in values):
            yield f"--{dest} is not a number: {value}"
    new = args.rollout.max_new_tokens
    if new is not None and args.data.max_len <= new:
        yield (
            f"--data.max_len {args.data.max_len} leaves no room for a prompt before --rollout.max_new_tokens {new}: "
            "it counts prompt and response together"
        )


# A model's folder.


def _model(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a model."""
    config = _json(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    index = next(iter(sorted(folder.glob("*.index.json"))), None)
    if index is not None:
        content = _json(index)
        if isinstance(content, str):
            yield content
            return
        files = [folder / name for name in sorted(set(content.get("weight_map", {}).values()))]
    else:
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files and not any(folder.glob("*.bin")):
        yield "it has no weights (*.safetensors or *.bin)"
    for file in files:
        problem = _weights(file)
        if problem:
            yield f"{file.name} {problem}"


def _json(path: Path) -> Any:
    """An object of a JSON file, or what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {path.name}; is it a model's folder?"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    except ValueError as error:
        return f"{path.name} is not JSON: {error}"
    return content if isinstance(content, dict) else f"{path.name} is no JSON object"


def _weights(file: Path) -> str | None:
    """What is wrong with a file of weights: it is not there, a pointer of Git LFS, or cut short."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(b"version "):
            return "is a pointer of Git LFS and not the weights: `git lfs pull` brings them"
        if file.suffix != ".safetensors":
            return None if size else "is empty"
        length = int.from_bytes(start, "little")
        if length + 8 > size:
            return f"is cut short ({size:,} bytes)"
        try:
            header = json.loads(opened.read(length))
            end = max((part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "has no header of safetensors"
    return None if 8 + length + end <= size else f"is cut short ({size:,} of {8 + length + end:,} bytes)"


def _policy(args: SimpleNamespace, folder: Path) -> Iterator[str]:
    """What of a policy's folder does not fit the run."""
    flag = f"--actor.model_name_or_path {folder}"
    config, tokenizer = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    if isinstance(config, str):
        return
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if isinstance(positions, int) and not scaled and args.data.max_len > positions:
        yield f"--data.max_len {args.data.max_len} is more than the {positions} positions of {folder}"
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in known) and isinstance(tokenizer, str):
        yield f"{flag}: it has no tokenizer ({', '.join(known[:3])} …)"
        return
    templated = any(folder.glob("chat_template*")) or "chat_template" in tokenizer
    if args.data.apply_chat_template and not templated:
        yield f"--data.apply_chat_template: the tokenizer of {folder} has no chat template; drop the flag"


# Prompts.


def _prompts(args: SimpleNamespace, dest: str, template: Callable[[list[Any]], str] | None) -> tuple[list, list]:
    """Problems of the lines of a flag's files, and notes, each with the flag."""
    data = args.data
    flags = ("--data.input_key", "--data.label_key", "--data.apply_chat_template")
    lines = Lines(Columns(data.input_key, data.label_key, data.apply_chat_template, flags), template, table=True)
    found, notes = [], []
    for path in _local(_value(args, dest)):
        if path.suffix != ".jsonl":
            continue
        wrong, seen = [], Counter()
        for row in lines.read(path, _MOST_BYTES):
            if isinstance(row, str):
                wrong.append(row)
            else:
                seen[hash(json.dumps(row["input"]))] += 1
        more = [f"{path}: and {len(wrong) - _SHOWN} more lines"] if len(wrong) > _SHOWN else []
        found += [f"--{dest} {line}" for line in wrong[:_SHOWN] + more]
        twice = sum(times > 1 for times in seen.values())
        if twice:
            notes.append(f"--{dest} {path}: {twice} of {len(seen)} prompts are there more than once")
    found += [f"--{dest} {line}" for line in lines.dates()]
    return found, notes


def _local(names: str | None) -> Iterator[Path]:
    """What is here of the data sets that a flag names."""
    for name in (names or "").split(","):
        path = Path(name.partition("@")[0].strip())
        if path.exists():
            yield path


# The reward.


def reward(url: str) -> Iterator[str]:
    """What is wrong with a ``--reward.remote_url``, as far as that is seen without running or asking it."""
    if not url.endswith(".py"):
        if not url.startswith(("http://", "https://")):
            yield "is neither a Python file (.py) nor the address of a server (http://… or https://…)"
        return
    try:
        tree = ast.parse(Path(url).read_bytes(), filename=url)  # bytes: a BOM and a coding line are Python's to read
    except OSError as error:
        yield error.strerror or str(error)
        return
    except (SyntaxError, ValueError) as error:
        yield str(error)
        return
    nodes = list(ast.walk(tree))
    own = [node for node in nodes if getattr(node, "name", None) == _FUNCTION and isinstance(node, _DEFINITIONS)]
    for node in own:
        if isinstance(node, ast.AsyncFunctionDef):
            yield f"{_FUNCTION} is async; the host calls it in a thread and awaits nothing: define it without async"
        elif isinstance(node, ast.FunctionDef) and not _takes_three(node.args):
            yield f"{_FUNCTION} must take three arguments (queries, prompts, labels)"
    imported = {
        alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    mentioned = {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    if not own and not {_FUNCTION, "*"} & imported and _FUNCTION not in mentioned:
        yield f"it defines no {_FUNCTION}(queries, prompts, labels)"


_FUNCTION = "reward_func"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _takes_three(arguments: ast.arguments) -> bool:
    most = len(arguments.posonlyargs + arguments.args)
    least = most - len(arguments.defaults)
    named = [default for default in arguments.kw_defaults if default is None]
    return not named and least <= 3 and (most >= 3 or arguments.vararg is not None)


# Output.


def _folder(path: Path) -> Iterator[str]:
    """Why a folder cannot be written."""
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        yield f"{path}: a file is where the folder should be"
    elif not os.access(path, os.W_OK):
        yield f"{path}: this folder cannot be written"
