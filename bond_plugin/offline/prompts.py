"""Prompts as training has them: the host's own dataset applies the chat template or the input template.

Everything here gives (prompt, label) pairs: the text that the policy's tokenizer gets, and what the reward gets
beside it, "" without a label.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.files import open_file, parse_json
from bond_plugin.words import reason, shorten

Pairs = list[tuple[str, Any]]
CONFIGURATION = "run.json"
"""What training writes beside ``metrics.jsonl``: the host's nested arguments."""


class DataError(ValueError):
    """Prompts that cannot be used. The message says which, and what to do."""


def tokenizer_of(args: SimpleNamespace) -> Any:
    """The policy's tokenizer, loaded as the host's trainer does: once, as long as its files stay as they are."""
    name = args.actor.model_name_or_path
    stamps = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(Path(name).glob("*")))
    return _tokenizer(name, not args.data.disable_fast_tokenizer, stamps)


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, fast: bool, stamps: tuple) -> Any:
    from openrlhf.utils import get_tokenizer

    return get_tokenizer(name, None, "left", use_fast=fast)


def training_prompts(args: SimpleNamespace, tokenizer: Any) -> Pairs:
    """The pairs of a run, each once, in the order of its data. Raises DataError as :func:`column`."""
    pairs = column(args, tokenizer, args.data.label_key, "--data.label_key")
    return list({(prompt, label_text(label)): (prompt, label) for prompt, label in pairs}.values())


def column(args: SimpleNamespace, tokenizer: Any, key: str | None, flag: str) -> Pairs:
    """The prompt of each row of a run's data, in its order, and what the row has under ``key``, "" without a key.

    By the host's own function, so they are the strings that training looks up. ``flag`` names the key in messages.
    Raises DataError for a prompt that is no text, or data without the key.
    """
    from openrlhf.trainer.ppo_trainer import prepare_datasets

    run = copy.copy(args)
    run.eval = SimpleNamespace(**{**vars(args.eval), "dataset": None})
    run.data = SimpleNamespace(**{**vars(args.data), "label_key": key})
    strategy = _strategy(run)
    strategy.setup_dataloader = lambda dataset, *settings, **more: dataset
    try:
        dataset, _, _ = prepare_datasets(strategy, tokenizer)
    except KeyError as error:
        raise DataError(
            f"--data.prompt_dataset {args.data.prompt_dataset} has no key {error}: set --data.input_key or {flag}"
        ) from error
    return _texts(dataset, "--data.apply_chat_template")


def held_out(rows: list[dict[str, Any]], data: SimpleNamespace, tokenizer: Any, chat_flag: str) -> Pairs:
    """The pairs of rows from :func:`read_rows`, ``input`` (text, or messages) and ``label``, in their order.

    ``apply_chat_template`` and ``input_template`` of the host's ``--data.*`` are used; ``chat_flag`` is what the
    message names for conversations. Raises DataError, to follow where they come from, for what is no text or fits no
    template.
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


class Lines:
    """Reads files of prompts, JSON lines in UTF-8, and says of each line what is wrong with it.

    Args:
        keys: of the prompt and, if there is one, of the label.
        flags: what a command calls the flags of the two keys, and of the chat template.
        chat: whether a chat template is applied, so that a prompt may be a conversation.
        template: makes text of a conversation; each order of roles is tried once.
        table: the host reads the files, as one table: a column has values of one kind.
    """

    def __init__(
        self,
        keys: tuple[str, str | None],
        flags: tuple[str, str, str],
        chat: bool,
        template: Callable[[list[Any]], str] | None = None,
        table: bool = False,
    ) -> None:
        (self._prompt, self._label), self._flags, self._chat = keys, flags, chat
        self._template, self._table = template, table
        self._kinds: dict[str, tuple[str, str]] = {}  # of each column: the kind of its values, and where it was seen
        self._roles: set[tuple[str, ...]] = set()  # orders of roles that were put into the template
        self._dates: dict[str, str] = {}  # where a text was seen that the host takes for a date, by its place
        self._no_dates: set[str] = set()  # places with others, too

    def read(self, path: Path, most: float = math.inf) -> Iterator[dict[str, Any] | str]:
        """Of each line the row, ``input`` and ``label`` ("" without a key for it); or what is wrong with it.

        Empty lines are passed over, and after ``most`` bytes nothing more is read.
        """
        count = 0
        try:
            with open_file(path) as file:
                for number, line in enumerate(file, start=1):
                    if file.tell() > most:
                        break
                    if line.strip():
                        count += 1
                        yield self._row(line, f"{path}, line {number}")
        except OSError as error:
            yield f"{path}: {reason(error)}"
        else:
            if not count:
                yield f'{path} is empty: it needs a line for each prompt, like {{"{self._prompt}": "..."}}'

    def read_table(self, path: Path, most: int) -> Iterator[dict[str, Any] | str]:
        """The same of the first ``most`` rows of a CSV or Parquet file or a JSON list, with the host's own reader."""
        from datasets import load_dataset

        number = 0
        with _quiet_reader():
            try:
                rows = load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True)
                for number, item in enumerate(itertools.islice(rows, most), start=1):
                    yield self._row(item, f"{path}, row {number}")
            except Exception as error:  # of pandas, pyarrow or datasets, each with kinds of its own
                yield f"{path}: {shorten(error, 200)}"
            else:
                if not number:
                    yield f"{path} has no rows: it needs one for each prompt"

    def dates(self) -> Iterator[str]:
        """After all files: columns of prompts or labels whose texts are all dates, which the host makes times of."""
        for place in sorted(self._dates.keys() - self._no_dates):
            yield (
                f"{self._dates[place]}: every '{place}' is a date, and the host would make times of them: put a word "
                "before each, or give another key"
            )

    def _row(self, item: Any, where: str) -> dict[str, Any] | str:
        try:
            if isinstance(item, bytes):
                item = parse_json(item.rstrip())
            self._check(item, where)
        except ValueError as error:
            return f"{where} {error}"
        return {"input": item[self._prompt], "label": "" if self._label is None else item[self._label]}

    def _check(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise ValueError(f"is no JSON object: {shorten(item, 40)}")
        for flag, key in zip(self._flags, (self._prompt, self._label), strict=False):
            if key is not None and key not in item:
                raise ValueError(f"has no key '{key}' (it has {', '.join(map(repr, item)) or 'none'}): set {flag}")
        prompt = item[self._prompt]
        self._check_prompt(prompt)
        if self._table:
            self._check_kinds(item, where)
        if self._template is not None:
            self._try_template(prompt, self._template)

    def _check_prompt(self, prompt: Any) -> None:
        key = self._prompt
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError(f"has an empty '{key}'; a prompt is a non-empty text")
        elif not isinstance(prompt, list):
            raise ValueError(f"has no text under '{key}', but {shorten(prompt, 40)}")
        elif not self._chat:
            flag = self._flags[2]
            raise ValueError(f"has a conversation under '{key}': set {flag}; the chat template makes it text")
        elif not prompt or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in prompt):
            raise ValueError(f"has a message under '{key}' without 'role' and 'content'")
        else:
            for one in prompt:
                if not isinstance(one["role"], str) or not isinstance(one["content"], str | list | None):
                    raise ValueError(
                        f"has a message under '{key}' whose 'role' is no text, or whose 'content' is neither text "
                        f"nor a list of parts: {shorten(one, 60)}"
                    )

    def _check_kinds(self, item: dict[str, Any], where: str) -> None:
        for key, value in item.items():
            kind = _KINDS.get(type(value))
            if kind is None:  # null goes with every kind
                continue
            known, seen = self._kinds.setdefault(key, (kind, where))
            if known != kind:
                raise ValueError(f"has {kind} under '{key}', and {seen} has {known}: a column has values of one kind")
        for key in {self._prompt, self._label} & item.keys():
            for place, value in _leaves(item[key], key):
                if isinstance(value, str) and _DATE.fullmatch(value):
                    self._dates.setdefault(place, where)
                elif value is not None:
                    self._no_dates.add(place)

    def _try_template(self, prompt: str | list, template: Callable[[list[Any]], str]) -> None:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        roles = tuple(message["role"] for message in chat)
        if roles in self._roles or len(self._roles) > _ORDERS:
            return
        self._roles.add(roles)
        said = [message["content"].strip() for message in chat if isinstance(message["content"], str)]
        try:
            text = template(chat)
            if said and not any(one in text for one in said):
                raise ValueError(f"it makes {shorten(text, 60)} of them, in which none of their texts is")
        except Exception as error:
            raise ValueError(
                f"does not fit the tokenizer's chat template (roles: {', '.join(roles)}): {error}"
            ) from error


_ORDERS = 50  # of roles of conversations that are put into the chat template
_KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
#: What the host's reader of tables takes for a point in time.
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d(:\d\d)?)?(Z|[+-]\d\d(:?\d\d)?)?)?")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What nested lists and objects hold, each with its place: ``label.when``, or ``input[].content``."""
    inner = value.items() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield place, value
    for one in inner or ():
        yield from _leaves(one[1], f"{place}.{one[0]}") if isinstance(value, dict) else _leaves(one, f"{place}[]")


def whole_table(path: Path) -> Iterator[str]:
    """Why the host cannot read a file of more than one block of its reader, if it cannot."""
    from datasets import load_dataset

    with _quiet_reader():
        try:
            load_dataset("json" if path.suffix == ".jsonl" else path.suffix[1:], data_files=str(path))
        except Exception as error:
            said = shorten(str(error.__cause__ or error), 200)
            yield f"{path}: its first lines must have the columns and kinds of all, for the host's reader: {said}"


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """The host's reader, without its progress and the tracebacks of what is told here."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    loud, bare = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        if not bare:
            enable_progress_bars()
        logging.set_verbosity(loud)


def chat_template(tokenizer: Any) -> Callable[[list[Any]], str]:
    """How the host makes text of a conversation."""
    return lambda chat: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def read_rows(path: Path, lines: Lines) -> list[dict[str, Any]]:
    """The rows of a file. Raises DataError: the first line that is no use, and how many others are not."""
    found = list(lines.read(path))
    wrong = [row for row in found if isinstance(row, str)]
    if wrong:
        raise DataError(wrong[0] + (f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""))
    return found


def template_problem(template: str) -> str | None:
    """Why the host cannot put a prompt into an ``--data.input_template``, or would leave the template out."""
    if "{}" not in template:
        return f"needs {{}} where the prompt goes, got {template!r}"
    try:
        if "\0" in template.format("\0"):
            return None
        said = "{{}} is no place for the prompt"
    except (LookupError, ValueError, AttributeError) as error:
        said = repr(error)
    return f"may have braces only in {{}}, where the prompt goes, and doubled elsewhere, got {template!r}: {said}"


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
