"""What the rewards share: settings in the environment, the parts of a query, calls of many threads in one batch."""

from __future__ import annotations

import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from bond_plugin.words import shorten

#: A regular expression whose first group is the question in a prompt; without it the whole prompt is the question.
QUESTION = "BOND_REWARD_QUESTION"

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:pad|eos|bos|unk|start_of_turn|end_of_turn)>")


def setting(name: str, meaning: str) -> str:
    """The environment variable ``name``. Raises ValueError, which says what it means, if it is not set."""
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"the environment variable {name} must be set: {meaning}")
    return value


def number(name: str, default: float, low: float, high: float = math.inf) -> float:
    """The number in the environment variable ``name``; whole where ``default`` is an ``int``.

    Raises ValueError if it is no such number, or not from ``low`` to ``high``.
    """
    text, kind = os.environ.get(name, str(default)), type(default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (low <= value <= high and math.isfinite(value)):
        bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"the environment variable {name} must be {what} {bound}, got '{text}'")
    return value


def plain(text: str) -> str:
    """Without what looks like a special token, for texts whose tokenizer is not at hand."""
    return _SPECIAL.sub("", text)


def parts(query: str, prompt: str) -> tuple[str, str]:
    """Question and response of a query, without special tokens and white space around them.

    Raises ValueError if the query does not begin with its prompt, or ``BOND_REWARD_QUESTION`` finds nothing in it.
    """
    if not query.startswith(prompt):
        raise ValueError(
            f"the query {shorten(query)} does not begin with its prompt {shorten(prompt)}: the prompt was cut "
            "(--data.max_len less --rollout.max_new_tokens is too short), or the tokenizer does not give it back"
        )
    question, pattern = prompt, os.environ.get(QUESTION)
    if pattern:
        try:
            found = re.search(pattern, prompt, re.DOTALL)
            question = found[1] if found else ""
        except (re.error, IndexError) as error:
            raise ValueError(f"{QUESTION} must be a regular expression with a group, got '{pattern}'") from error
    question = plain(question).strip()
    if not question:
        raise ValueError(f"no question in the prompt {shorten(prompt)} ({QUESTION} is {pattern!r})")
    return question, plain(query[len(prompt) :]).strip()


def loaded(kind: Any, folder: str, device: str) -> Any:
    """A model of a class of transformers: in float32 on a CPU, elsewhere in bf16."""
    return kind.from_pretrained(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16).to(device).eval()


class Batches:
    """Calls of many threads, done together: the host asks for one reward at a time, from up to 32 threads.

    ``score`` makes as many results of at most ``size`` items; never called by two threads at once.
    """

    def __init__(self, score: Callable[[list[Any]], Sequence[Any]], size: int) -> None:
        self._score, self._size = score, size
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Any, Future]] = deque()

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        """The results of ``items``; what ``score`` raises for a batch, all raise who have an item in it."""
        mine = [(item, Future()) for item in items]
        self._waiting.extend(mine)
        with self._lock:
            while not all(future.done() for _, future in mine):
                taken = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                try:
                    found = self._score([item for item, _ in taken])
                    for (_, future), value in zip(taken, found, strict=True):
                        future.set_result(value)
                except BaseException as error:
                    for _, future in taken:
                        if not future.done():
                            future.set_exception(error)
        return [future.result() for _, future in mine]
