"""What can be seen of the models of a run without loading them: their files, their configurations, the tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.files import parse_json
from bond_plugin.offline import fingerprints
from bond_plugin.offline.prompts import tokenizer_of
from bond_plugin.words import reason


def named(args: SimpleNamespace) -> dict[str, str]:
    """The models that a run takes, by their flags: names or folders."""
    groups = ("actor", "critic", "ref") if args.reward.remote_url else ("actor", "critic", "ref", "reward")
    found = {f"{group}.model_name_or_path": getattr(args, group).model_name_or_path for group in groups}
    return {dest: name for dest, name in found.items() if name}


def files(folder: Path, policy: bool) -> Iterator[str]:
    """What is wrong with the files of a model, which is the policy or another one."""
    if (folder / "adapter_config.json").is_file():
        yield "it is a LoRA adapter: merge it into its model (merge_and_unload of peft), and name that folder"
        return
    config = _json(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    yield from _known(config, folder, policy)
    # Where there are safetensors, neither transformers nor vLLM looks at others.
    kind = "*.safetensors" if any(folder.glob("*.safetensors*")) else "pytorch_model*.bin"
    index = next(iter(sorted(folder.glob(f"{kind}.index.json"))), None)
    if index is not None:
        content = _json(index)
        if isinstance(content, str):
            yield content
            return
        files = [folder / name for name in fingerprints.indexed(content)]
        if not files:
            yield f"{index.name} has no 'weight_map' of files"
            return
    else:
        files = sorted(folder.glob(kind))
    if not files and not any(folder.glob("*.bin")):
        yield "it has no weights (*.safetensors or *.bin)"
    for file in files:
        problem = _weights(file)
        if problem:
            yield f"{file.name} {problem}"


def _known(config: dict[str, Any], folder: Path, policy: bool) -> Iterator[str]:
    """What transformers has against a configuration, and whether a policy is a language model."""
    from transformers import AutoConfig

    if "auto_map" in config:  # a model with code of its own
        return
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:  # of any model's class
        yield f"config.json is none that transformers reads: {_first(error)}"
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if policy and names and all(name.endswith(_NO_LANGUAGE) for name in names):
        yield f"it is a {names[0]} by its config.json, and no language model"


def unloadable(folder: Path, language: bool) -> Iterator[str]:
    """What transformers finds when it loads a model as the host does, but for the numbers: it reads headers alone.

    Nothing of one with code of its own, quantised, or with images, which are loaded otherwise.
    """
    import transformers
    from transformers.utils import logging

    if {"auto_map", "quantization_config", "vision_config"} & _json(folder / "config.json").keys():
        return
    kind = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    loud, how = logging.get_verbosity(), {"output_loading_info": True, "ignore_mismatched_sizes": True}
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        _, found = kind.from_pretrained(folder, device_map="meta", **how)
        for name, there, wanted in sorted(found["mismatched_keys"])[:1]:
            yield f"{name} is {[*there]} in its files and {[*wanted]} by its config.json"
        if missing := sorted(found["missing_keys"]):
            yield f"its files lack {len(missing)} weights, such as {missing[0]}: the host would make random ones"
    except Exception as error:  # of any model's class
        yield f"transformers cannot load it: {_first(error)[:200]}"
    finally:
        logging.set_verbosity(loud)
        logging.enable_progress_bar()


_NO_LANGUAGE = ("Classification", "ForMaskedLM", "ForQuestionAnswering", "ForMultipleChoice")


def _json(path: Path) -> Any:
    """An object of a JSON file, or what is wrong with it."""
    try:
        content = parse_json(path.read_bytes(), finite=False)
    except FileNotFoundError:
        return f"it has no {path.name}; is it a model's folder?"
    except OSError as error:
        return f"{path.name}: {reason(error)}"
    except ValueError as error:
        if path.read_bytes().startswith(_LFS):
            return f"{path.name} {_POINTER}"
        return f"{path.name} {error}"
    return content if isinstance(content, dict) else f"{path.name} is no JSON object"


def _first(error: Exception) -> str:
    """The first line of an error of a library."""
    return str(error).strip().partition("\n")[0] or repr(error)


_LFS = b"version https://git-lfs"
_POINTER = "is a pointer of Git LFS and not the file: `git lfs pull` brings it"


def _weights(file: Path) -> str | None:
    """What is wrong with a file of weights: it is not there, a pointer of Git LFS, or cut short."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(_LFS[:8]):
            return _POINTER
        if file.suffix != ".safetensors":
            return None if size else "is empty"
        length = int.from_bytes(start, "little")
        if length + 8 > size:
            return f"is cut short ({size:,} bytes)"
        try:
            header = json.loads(opened.read(length))
            end = max((part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "has no header of safetensors"
    return None if 8 + length + end <= size else f"is cut short ({size:,} of {8 + length + end:,} bytes)"


def without_head(folder: Path, prefix: str) -> str | None:
    """The name of the tensor that a reward model lacks where the host looks for its head, or ``None``.

    It looks where the model's own config says, else at ``prefix``. Of other files than safetensors nothing is said.
    """
    from safetensors import safe_open

    config = _json(folder / "config.json")
    wanted = f"{config.get('value_head_prefix', prefix)}.weight"
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            names += opened.keys()
    return wanted if names and not any(f".{name}".endswith(f".{wanted}") for name in names) else None


def policy(args: SimpleNamespace) -> tuple[Any, list[str]]:
    """The policy's tokenizer, from a folder that :func:`files` found whole, and what does not fit the run."""
    flag = f"--actor.model_name_or_path {args.actor.model_name_or_path}"
    try:
        tokenizer = tokenizer_of(args)
    except Exception as error:  # of any of the libraries that read tokenizers
        return None, [f"{flag}: it has no tokenizer that can be loaded: {_first(error)}"]
    return tokenizer, list(_misfits(args, Path(args.actor.model_name_or_path), tokenizer, flag))


def _misfits(args: SimpleNamespace, folder: Path, tokenizer: Any, flag: str) -> Iterator[str]:
    text = _text_of(_json(folder / "config.json"))
    positions, embedded = text.get("max_position_embeddings"), text.get("vocab_size")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    if isinstance(positions, int) and not scaled and args.data.max_len > positions:
        yield f"--data.max_len {args.data.max_len} is more than the {positions} positions of {folder}"
    if tokenizer.eos_token_id is None:
        yield f"{flag}: its tokenizer has no eos_token, so no response would end: name it in tokenizer_config.json"
    for name in ("eos_token", "pad_token"):
        token = getattr(tokenizer, f"{name}_id")
        if isinstance(embedded, int) and isinstance(token, int) and token >= embedded:
            yield f"{flag}: the {name} of its tokenizer is {token}, and the model has {embedded} embeddings"
    if args.data.apply_chat_template and not tokenizer.chat_template:
        yield f"--data.apply_chat_template: the tokenizer of {folder} has no chat template; drop the flag"
    for dest, name in named(args).items():
        other = Path(name) if os.path.isdir(name) else folder
        if other != folder and (problem := _other_tokens(folder, other, embedded, len(tokenizer))):
            yield f"--{dest} {name}: it gets the policy's tokens, and {problem}"


def _text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of a model of several kinds of input the part that is about text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and text else config


def _other_tokens(policy: Path, other: Path, embedded: Any, tokens: int) -> str | None:
    """Why a model cannot read the policy's tokens."""
    config = _json(other / "config.json")
    size = None if isinstance(config, str) else _text_of(config).get("vocab_size")
    needed = min(embedded, tokens) if isinstance(embedded, int) else tokens
    if isinstance(size, int) and size < needed:
        return f"has {size} embeddings for {needed}"
    words = []
    for folder in (policy, other):
        content = _json(folder / "tokenizer.json")
        model = content.get("model") if isinstance(content, dict) else None
        words.append(model.get("vocab") if isinstance(model, dict) else None)
    return "its own tokenizer has another vocabulary" if None not in words and words[0] != words[1] else None
