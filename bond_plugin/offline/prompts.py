"""Prompts as training has them: the host's own dataset applies the chat template or the input template.

Everything here gives (prompt, label) pairs: the text that the policy's tokenizer gets, and what the reward gets
beside it, "" without a label.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.words import shorten

Pairs = list[tuple[str, Any]]
CONFIGURATION = "run.json"
"""What training writes beside ``metrics.jsonl``: the host's nested arguments."""


class DataError(ValueError):
    """Prompts that cannot be used. The message says which, and what to do."""


def tokenizer_of(args: SimpleNamespace) -> Any:
    """The policy's tokenizer, loaded as the host's trainer does."""
    from openrlhf.utils import get_tokenizer

    return get_tokenizer(args.actor.model_name_or_path, None, "left", use_fast=not args.data.disable_fast_tokenizer)


def training_prompts(args: SimpleNamespace, tokenizer: Any) -> Pairs:
    """The pairs of a run, each once, in the order of its data.

    They come from the host's own function, so they are the strings that training looks up. Its data loader, which
    would need Ray, is left out.

    Raises:
        DataError: a prompt that is no text, or data without the key that should hold it.
    """
    from openrlhf.trainer.ppo_trainer import prepare_datasets

    run = copy.copy(args)
    run.eval = SimpleNamespace(**{**vars(args.eval), "dataset": None})
    strategy = _strategy(run)
    strategy.setup_dataloader = lambda dataset, *settings, **more: dataset
    try:
        dataset, _, _ = prepare_datasets(strategy, tokenizer)
    except KeyError as error:
        raise DataError(
            f"--data.prompt_dataset {args.data.prompt_dataset} has no key {error}: set --data.input_key or "
            "--data.label_key"
        ) from error
    pairs = _texts(dataset, "--data.apply_chat_template")
    return list({(prompt, label_text(label)): (prompt, label) for prompt, label in pairs}.values())


def held_out(rows: list[dict[str, Any]], data: SimpleNamespace, tokenizer: Any, chat_flag: str) -> Pairs:
    """The pairs of rows from :func:`read_rows`, in their order.

    Args:
        rows: with ``input`` (text, or messages) and ``label``.
        data: the host's ``--data.*``: ``apply_chat_template`` and ``input_template`` are used.
        tokenizer: whose chat template is applied.
        chat_flag: what to set for conversations, for the message.

    Raises:
        DataError: a prompt that is not text, or fits no chat template. To follow where they come from.
    """
    from openrlhf.datasets import PromptDataset

    keys = SimpleNamespace(input_key="input", label_key="label", apply_chat_template=data.apply_chat_template)
    strategy = _strategy(SimpleNamespace(data=keys))
    try:
        dataset = PromptDataset(rows, tokenizer, strategy, input_template=data.input_template)
    except Exception as error:
        if not data.apply_chat_template:
            raise
        raise DataError(f"cannot be put into the tokenizer's chat template: {error}") from error
    return _texts(dataset, chat_flag)


def read_rows(
    path: Path, key: str, label_key: str | None, flags: tuple[str, str] = ("--input-key", "--label-key")
) -> list[dict[str, Any]]:
    """Prompts, without a template yet, and labels of a file of JSON lines.

    Args:
        path: the file; empty lines are passed over.
        key, label_key: the keys of prompt and label.
        flags: where these two are set, for the messages.

    Returns:
        Rows with ``input`` and ``label`` ("" without a ``label_key``).

    Raises:
        DataError: the first line that is no use.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save it in that encoding") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        for flag, wanted in zip(flags, (key, label_key), strict=True):
            if wanted is not None and (not isinstance(item, dict) or wanted not in item):
                has = f"it has {', '.join(map(repr, item))}" if isinstance(item, dict) else "it is no object"
                raise DataError(f"{path}, line {number} has no key '{wanted}' ({has}): set {flag}")
        if not item[key]:
            raise DataError(f"{path}, line {number}: '{key}' must be a non-empty text")
        rows.append({"input": item[key], "label": "" if label_key is None else item[label_key]})
    if not rows:
        raise DataError(f'{path} is empty: it needs at least one line like {{"{key}": "..."}}')
    return rows


def label_text(label: Any) -> str | None:
    """A label as JSON, or ``None`` for no label (``None`` or "")."""
    return None if label in (None, "") else json.dumps(label, sort_keys=True, default=str)


def _strategy(args: SimpleNamespace) -> SimpleNamespace:
    """What the host's dataset asks of its strategy."""
    return SimpleNamespace(args=args, print=lambda *words: None, is_rank_0=lambda: False)


def _texts(dataset: Any, chat_flag: str) -> Pairs:
    for prompt in dataset.prompts:
        if not isinstance(prompt, str) or not prompt:
            raise DataError(
                f"a prompt must be text that is not empty, found {shorten(prompt)}. If these are "
                f"conversations, set {chat_flag}: a chat template makes them text"
            )
    return list(zip(dataset.prompts, dataset.labels, strict=True))
