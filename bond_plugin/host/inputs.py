"""What can be seen of a run's inputs without starting it: numbers in their range, prompts, rewards, folders.

:func:`unseen` lists what is not looked at. :mod:`bond_plugin.host.models` looks at the models.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.files import open_file, unwritable
from bond_plugin.host import models
from bond_plugin.offline.prompts import Lines, chat_template, template_problem, whole_table
from bond_plugin.words import did_you_mean, reason

#: Flags, most of them the host's, by what each of their numbers must be.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "be at least 1": (
        lambda number: number >= 1,
        "actor.num_nodes actor.num_gpus_per_node critic.num_nodes critic.num_gpus_per_node ref.num_nodes "
        "ref.num_gpus_per_node reward.num_nodes reward.num_gpus_per_node vllm.tensor_parallel_size ds.ring_attn_size "
        "ds.tensor_parallel_size train.batch_size train.micro_batch_size train.max_epochs train.num_episodes "
        "train.max_tokens_per_gpu train.async_queue_size rollout.batch_size rollout.micro_batch_size "
        "rollout.vllm_generate_batch_size rollout.max_tokens_per_gpu rollout.max_new_tokens "
        "rollout.n_samples_per_prompt data.max_len data.max_samples logger.logging_steps ckpt.max_num "
        "eval.n_samples_per_prompt ds.zpg ds.ring_attn_head_stride algo.kl.horizon actor.muon.ns_steps "
        "critic.muon.ns_steps ref.interval",
    ),
    "be at least 0": (
        lambda number: number >= 0,
        "vllm.num_engines actor.adam.lr critic.adam.lr actor.adam.eps critic.adam.eps actor.max_norm critic.max_norm "
        "actor.adam.weight_decay critic.adam.weight_decay actor.eps_clip actor.eps_clip_low_high critic.value_clip "
        "algo.kl.init_coef ds.lora.rank ds.lora.alpha eval.temperature data.max_images_per_prompt "
        "data.dataloader_num_workers actor.muon.lr critic.muon.lr actor.aux_loss_coef actor.entropy_coef "
        "reward.overlong_penalty_factor bond.logits_mb bond.sync_mb",
    ),
    "be from 0 to 1": (
        lambda number: 0 <= number <= 1,
        "rollout.top_p algo.advantage.gamma algo.advantage.lambd actor.lr_warmup_ratio critic.lr_warmup_ratio "
        "actor.min_lr_ratio critic.min_lr_ratio train.ema_beta vllm.gpu_memory_utilization ds.lora.dropout",
    ),
    "be from 0 to 3": (lambda number: 0 <= number <= 3, "ds.zero_stage"),
    "be from 0 to 4294967295": (lambda number: 0 <= number < 2**32, "train.seed"),
    "be at least -1": (lambda number: number >= -1, "critic.freezing_steps"),
    "be at most 1": (lambda number: number <= 1, "reward.stop_properly_penalty_coef"),
    "be above 0": (
        lambda number: number > 0,
        "rollout.temperature rollout.top_p ckpt.max_mem vllm.gpu_memory_utilization reward.timeout algo.kl.target "
        "reward.overlong_buffer_len",
    ),
    "be above 1": (lambda number: number > 1, "actor.dual_clip"),
    "be at least 0.01, the least that vLLM takes": (lambda number: number >= 0.01, "rollout.temperature"),
    "be at least 1, or -1 for never": (lambda number: number >= 1 or number == -1, "eval.steps ckpt.save_steps"),
    "lie in [0, 1)": (
        lambda number: 0 <= number < 1,
        "actor.adam.betas critic.adam.betas actor.muon.momentum critic.muon.momentum",
    ),
    "lie in (0, 1]": (lambda number: 0 < number <= 1, "ref.eta"),
}
#: Flags of two numbers, and what the lower one must not be below.
_PAIRS = {
    "reward.clip_range": -math.inf,
    "algo.dynamic_filtering_range": -math.inf,
    "algo.advantage.is_correction_threshold": 0.0,
}
#: Of these infinity is a value: no limit.
_UNLIMITED = (
    "actor.max_norm",
    "critic.max_norm",
    "actor.eps_clip",
    "critic.value_clip",
    "ckpt.max_mem",
    "reward.timeout",
    "bond.max_weight",
    *_PAIRS,
)
_MOST_BYTES = 2**28  # of a file of prompts that are read
_MOST_ROWS = 1_000_000  # the same of a table
_BLOCK = 10 * 2**20  # bytes of JSON of which the host's reader makes a table at a time
_SHOWN = 5  # faulty lines of a file that are named


def import_folders(files: Iterable[str]) -> list[str]:
    """From where the user's Python files (rewards, agents) import their neighbours: their folders and this one."""
    folders = [os.path.dirname(os.path.abspath(file)) for file in files if file.endswith(".py")]
    return list(dict.fromkeys([os.getcwd(), *folders]))


def problems(args: SimpleNamespace) -> tuple[list[str], list[str]]:
    """Everything that is wrong with the files of a run, each with the flag; and notes."""
    found, notes = list(_models(args)), []
    judge = models.named(args).get("reward.model_name_or_path", "")
    if not found and os.path.isdir(judge) and (lacks := models.without_head(Path(judge), args.ds.value_head_prefix)):
        notes.append(
            f"--reward.model_name_or_path {judge} has no {lacks}: the host makes one of random numbers, and its "
            "rewards are no better. Where the head has another name: --ds.value_head_prefix"
        )
    tokenizer = None
    if not found and os.path.isdir(args.actor.model_name_or_path or ""):
        tokenizer, found = models.policy(args)
    if not found:
        folders = {dest: Path(name) for dest, name in models.named(args).items() if os.path.isdir(name)}
        for dest, folder in folders.items():
            wrong = models.unloadable(folder, language=dest.startswith(("actor", "ref")))
            found += [f"--{dest} {folder}: {line}" for line in wrong]
            if folder.resolve() == Path(args.ckpt.output_dir).resolve():
                found.append(f"--ckpt.output_dir {folder}: the trained policy would replace --{dest}: give another")
    template = chat_template(tokenizer) if args.data.apply_chat_template and tokenizer and not found else None
    found += [*_data_sets(args), *_code(args)]
    for dest in ("data.prompt_dataset", "eval.dataset"):
        wrong, seen = _prompts(args, dest, template)
        found, notes = found + wrong, notes + seen
    for dest in ("ckpt.output_dir", "ckpt.path", "logger.tensorboard_dir"):
        name = value(args, dest)
        if name is not None and (line := unwritable(name)):
            found.append(f"--{dest} {line}")
    return found, notes


def _models(args: SimpleNamespace) -> Iterator[str]:
    """What is wrong with the names and the files of the models."""
    if not args.actor.model_name_or_path:
        yield "--actor.model_name_or_path is missing: a model's name or folder"
    for dest, name in models.named(args).items():
        if os.path.isfile(name):
            yield f"--{dest} {name} is a file: name the model's folder"
        elif os.path.isdir(name):
            yield from (f"--{dest} {name}: {line}" for line in models.files(Path(name), dest.startswith("actor")))
        elif dest.startswith("reward") and "," in name:
            yield f"--{dest} {name}: the host takes one reward model"
        elif _missing(name):
            yield f"--{dest} {name}: no such file or folder"


#: Of names of files, and of none on a hub.
_ENDINGS = (".json", ".jsonl", ".py", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zip", ".zst", ".xz")


def _missing(name: str) -> bool:
    """Whether this is the name of a file or folder that is not here, and not one on a hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if os.path.exists(name):
        return False
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_ENDINGS)
    return True


def _code(args: SimpleNamespace) -> Iterator[str]:
    """What is wrong with the files of an agent or a reward, or the addresses of servers."""
    if agent := args.train.agent_func_path:
        if not agent.endswith(".py"):
            yield f"--train.agent_func_path {agent}: name a Python file (.py)"
        elif isinstance(nodes := _outermost(agent), str):
            yield f"--train.agent_func_path {agent}: {nodes}"
        elif not _may_bind(nodes, "AgentExecutor"):
            yield f"--train.agent_func_path {agent}: it defines no class AgentExecutor"
        return
    urls = args.reward.remote_url or []
    yield from (f"--reward.remote_url {url}: {problem}" for url in urls for problem in reward(url))
    if len(urls) > 1 and any(url.endswith(".py") for url in urls):
        yield f"--reward.remote_url {','.join(urls)}: of several the host takes servers alone; give one file"


def unseen(args: SimpleNamespace) -> list[str]:
    """What of a run's inputs was not looked at, so that a run may still end at it."""
    named = models.named(args).items()
    found = [f"--{dest} {name}: a name on a hub" for dest, name in named if not os.path.isdir(name)]
    for dest in ("data.prompt_dataset", "eval.dataset"):
        for name in data_sets(args, dest):
            kind = _kind(Path(name))
            if not os.path.exists(name):
                found.append(f"--{dest} {name}: a name on a hub")
            elif kind is None:
                found.append(f"--{dest} {name}: neither JSON lines nor a table")
            elif os.path.getsize(name) > _MOST_BYTES:
                most = f"{_MOST_BYTES // 2**20} MiB" if kind == "lines" else f"{_MOST_ROWS:,} rows"
                found.append(f"--{dest} {name}: what comes after {most}")
    agent = args.train.agent_func_path
    code = [("reward.remote_url", url) for url in args.reward.remote_url or []]
    for dest, name in [("train.agent_func_path", agent)] if agent else code:
        what = "what it does when it is imported and called" if name.endswith(".py") else "a server"
        found.append(f"--{dest} {name}: {what}")
    return [*found, "memory, ports, and the packages for a GPU"]


def value(args: SimpleNamespace, dest: str) -> Any:
    for part in dest.split("."):
        args = getattr(args, part, None)
    return args


def _numbers(args: SimpleNamespace, dest: str) -> list[Any]:
    """What a flag says, as a list; nothing if it is not given."""
    said = value(args, dest)
    return [] if said is None else list(said) if isinstance(said, list | tuple) else [said]


def numbers(args: SimpleNamespace, given: frozenset[str]) -> Iterator[str]:
    """Numbers that make no sense, each with the flag; of those that were ``given``, also what is no number.

    Before the host divides by any of them.
    """
    for must, (fits, dests) in RANGES.items():
        for dest in dests.split():
            values = _numbers(args, dest)
            if not all(map(fits, values)):
                yield f"--{dest} must {must}, got {' '.join(map(str, values))}"
    for dest, low in _PAIRS.items():
        values = _numbers(args, dest)
        if values == [low]:  # a single value is HIGH
            yield f"--{dest} must be above {low:g}, got {low}"
        elif values and (not low <= values[0] or any(one >= other for one, other in itertools.pairwise(values))):
            yield f"--{dest} takes LOW and HIGH, LOW below HIGH, got {' '.join(map(str, values))}"
    for dest in sorted(given):
        values = [one for one in _numbers(args, dest) if isinstance(one, int | float)]
        if any(isinstance(one, float) and math.isnan(one) for one in values):
            yield f"--{dest} is not a number: {value(args, dest)}"
        elif dest not in _UNLIMITED and any(abs(one) >= 2**63 for one in values):
            yield f"--{dest} is too large: {value(args, dest)}"
    new = args.rollout.max_new_tokens
    buffer = args.reward.overlong_buffer_len
    batch, drawn = args.rollout.batch_size, args.rollout.vllm_generate_batch_size or math.inf
    if drawn < batch:
        yield f"--rollout.vllm_generate_batch_size {drawn} is less than the --rollout.batch_size {batch} of a step"
    if None not in (new, buffer) and buffer > new:
        yield f"--reward.overlong_buffer_len {buffer:g} is more than --rollout.max_new_tokens {new}"
    if new is not None and args.data.max_len <= new:
        yield (
            f"--data.max_len {args.data.max_len} leaves no room for a prompt before --rollout.max_new_tokens {new}: "
            "it counts prompt and response together"
        )


def stumbles(args: SimpleNamespace) -> Iterator[str]:
    """What the host's own look at its flags would trip over, or pass over in silence, before ours comes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not args.vllm.num_engines:
        yield "--vllm.num_engines must be at least 1: samples come from vLLM"
    if not (args.reward.remote_url or args.reward.model_name_or_path or args.train.agent_func_path):
        yield (
            "no reward: give --reward.remote_url (a Python file with reward_func, or a server), or "
            "--reward.model_name_or_path"
        )
    if not (args.reward.remote_url or args.train.agent_func_path):
        for dest in ("eval.dataset", "algo.dynamic_filtering_enable"):
            if value(args, dest):
                yield f"--{dest} needs --reward.remote_url or an agent: the host asks no reward model there"
    if args.data.input_template and (problem := template_problem(args.data.input_template)):
        yield f"--data.input_template {problem}"
    if not args.ds.value_head_prefix:
        yield "--ds.value_head_prefix is empty: name the head of the reward model, such as score"
    if args.use_ms and importlib.util.find_spec("modelscope") is None:
        yield "--use_ms needs the package modelscope: install it, or drop the flag"
    name, known = args.ds.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    known = sorted(one for one in known if "|" not in one)
    if name not in known and "/" not in name:  # the latter a kernel on a hub
        yield f"--ds.attn_implementation {name} is none of {', '.join(known)}{did_you_mean(name, known)}"


# Prompts.


def _prompts(args: SimpleNamespace, dest: str, template: Callable[[list[Any]], str] | None) -> tuple[list, list]:
    """Problems of the lines of a flag's files, and notes, each with the flag."""
    data = args.data
    flags = ("--data.input_key", "--data.label_key", "--data.apply_chat_template")
    lines = Lines((data.input_key, data.label_key), flags, data.apply_chat_template, template, table=True)
    found, notes, count = [], [], 0
    for path in filter(Path.exists, map(Path, data_sets(args, dest))):
        kind = _kind(path)
        rows = lines.read(path, _MOST_BYTES) if kind == "lines" else lines.read_table(path, _MOST_ROWS)
        if kind is None:
            count += args.rollout.batch_size  # or more: it is not looked at
            continue
        wrong, seen = [], Counter()
        for row in rows:
            if isinstance(row, str):
                wrong.append(row)
            else:
                seen[hash(json.dumps(row["input"]))] += 1
        if not wrong and _BLOCK < path.stat().st_size <= _MOST_BYTES:
            wrong += whole_table(path)
        more = [f"{path}: and {len(wrong) - _SHOWN} more lines"] if len(wrong) > _SHOWN else []
        found += [f"--{dest} {line}" for line in wrong[:_SHOWN] + more]
        twice = sum(times > 1 for times in seen.values())
        if twice:
            notes.append(f"--{dest} {path}: {twice} of {len(seen)} prompts are there more than once")
        count += min(seen.total(), args.data.max_samples)
    found += [f"--{dest} {line}" for line in lines.dates()]
    count = min(count, args.data.max_samples)
    if dest == "data.prompt_dataset" and 0 < count < args.rollout.batch_size:
        trained = count * args.rollout.n_samples_per_prompt >= args.train.batch_size
        effect = "a step has no more than these" if trained else "no step is taken"
        notes.append(f"{count} prompts are fewer than --rollout.batch_size {args.rollout.batch_size}: {effect}")
    return found, notes


def data_sets(args: SimpleNamespace, dest: str) -> list[str]:
    """The data sets that a flag names, files or not."""
    names = (name.partition("@")[0].strip() for name in (value(args, dest) or "").split(","))
    return list(filter(None, names))


def _kind(path: Path) -> str | None:
    """Whether a data set is read as ``lines`` of JSON, as a ``table`` (JSON that is one list, too), or not at all."""
    if path.suffix == ".json" and path.is_file():
        with open_file(path) as file:
            return "table" if file.read(1024).lstrip(b"\xef\xbb\xbf \n\r\t").startswith(b"[") else "lines"
    if path.suffix == ".jsonl":
        return "lines"
    return "table" if path.suffix in (".csv", ".parquet") and path.is_file() else None


_TABLES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


def _data_sets(args: SimpleNamespace) -> Iterator[str]:
    """What is wrong with the names of data sets, their splits and their shares."""
    for dest, split in (("data.prompt_dataset", "data.prompt_split"), ("eval.dataset", "eval.split")):
        names = data_sets(args, dest)
        if 0 < (value(args, dest) or "").count(",") >= len(names):
            yield f"--{dest} {value(args, dest)}: a name is missing between its commas"
        if not names and dest.startswith("data"):
            yield f"--{dest} is missing: a data set's name or a .jsonl file of prompts"
        yield from (f"--{dest} {name}: no such file or folder" for name in names if _missing(name))
        for name in filter(os.path.isfile, names):
            if not name.endswith(_TABLES):
                yield f"--{dest} {name}: the host reads files of the kinds {', '.join(_TABLES)}"
            elif value(args, split) != "train":
                yield f"--{split} {value(args, split)}: the only split of the file {name} is train"
    if args.data.prompt_probs is not None:
        text, sets, shares = args.data.prompt_probs, (args.data.prompt_dataset or "").count(",") + 1, []
        with contextlib.suppress(ValueError):
            shares = [float(share) for share in text.split(",")]
        if len(shares) != sets or not min(shares) > 0 or not math.isclose(sum(shares), 1, abs_tol=1e-8):
            one = f"for each data set ({sets}) one number above 0, with commas, together 1"
            yield f"--data.prompt_probs {text}: {one}"


# The reward.


def reward(url: str) -> Iterator[str]:
    """What is wrong with a ``--reward.remote_url``, as far as that is seen without running or asking it."""
    if not url.endswith(".py"):
        if not url.startswith(("http://", "https://")):
            yield "is neither a Python file (.py) nor the address of a server (http://… or https://…)"
        elif problem := _address(url):
            yield problem
        return
    if isinstance(nodes := _outermost(url), str):
        yield nodes
        return
    for node in nodes:
        assigned = isinstance(node, ast.Assign) and [getattr(one, "id", None) for one in node.targets] == [_FUNCTION]
        own = node.value if assigned else node
        if not assigned and (getattr(node, "name", None) != _FUNCTION or getattr(node, "decorator_list", None)):
            continue  # or a decorator, which may make anything of it
        if isinstance(own, ast.AsyncFunctionDef):
            yield f"{_FUNCTION} is async; the host calls it in a thread and awaits nothing: define it without async"
        elif isinstance(own, ast.FunctionDef | ast.Lambda) and not _takes_three(own.args):
            yield f"{_FUNCTION} must take three arguments (queries, prompts, labels)"
        elif isinstance(own, ast.FunctionDef) and any(isinstance(one, ast.Yield) for one in _outside(own)):
            yield f"{_FUNCTION} is a generator: let it return, not yield"
    if not _may_bind(nodes, _FUNCTION):
        yield f"it defines no {_FUNCTION}(queries, prompts, labels)"


def _outermost(file: str) -> list[ast.AST] | str:
    """What a Python file has outside of functions and classes, and all texts in it; or why it is no Python."""
    try:
        tree = ast.parse(Path(file).read_bytes(), file)  # bytes: a BOM and a coding line are Python's to read
    except OSError as error:
        return reason(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error) or repr(error)
    return [*_outside(tree), *(node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.Global))]


def _outside(node: ast.AST) -> Iterator[ast.AST]:
    for one in ast.iter_child_nodes(node):
        yield one
        if not isinstance(one, (*_DEFINITIONS, ast.Lambda)):
            yield from _outside(one)


def _may_bind(nodes: list[ast.AST], name: str) -> bool:
    """Whether a file may have something of this name: a definition, an import, a variable, or a text that says it."""
    words = [getattr(node, key, None) for node in nodes for key in ("name", "asname", "id", "value")]
    words += [word for node in nodes if isinstance(node, ast.Global) for word in node.names]
    return name in words or "*" in words


def _address(url: str) -> str | None:
    """What is wrong with the address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no address: {error}"
    if not parts.hostname or port == 0 or re.search(r"[\s\x00-\x1f]", url):
        return "is no address: it needs a host, like http://localhost:5000/score"
    return None


_FUNCTION = "reward_func"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _takes_three(arguments: ast.arguments) -> bool:
    most = len(arguments.posonlyargs + arguments.args)
    least = most - len(arguments.defaults)
    named = [default for default in arguments.kw_defaults if default is None]
    return not named and least <= 3 and (most >= 3 or arguments.vararg is not None)
