"""Answers of chains of thought, read and compared by math-verify in a process of their own.

math-verify ends what takes too long only in a main thread, and rewards are computed in others. Texts are exchanged,
no expressions: putting 10^10^10 together again would evaluate it.
"""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from typing import Any, NamedTuple

from bond_plugin.host.watch import end_with_parent

_LIMIT = 60.0  # seconds, for what even a signal does not end
_lock = threading.Lock()


class Answer(NamedTuple):
    """How a text ends: the answer in its words, and the text."""

    words: str
    text: str


def read(text: str) -> Answer | None:
    """The answer of a text: the one in ``\\boxed{}``, or after such words as "the answer is", or the last number.

    Raises:
        ImportError: math-verify is missing.
    """
    words = _asked(_words, text, otherwise=None)
    return None if words is None else Answer(words, text)


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal as numbers or expressions; not, where that takes too long to find out."""
    return _asked(_equal, one.text, other.text, otherwise=False)


@functools.cache
def _process() -> ProcessPoolExecutor:
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError("answers are read with math-verify: pip install 'openrlhf-bond[fobar]'") from error
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def _asked(function: Callable[..., Any], *texts: str, otherwise: Any) -> Any:
    """What the process answers; if it does not, ``otherwise``, and another process."""
    with _lock:
        process = _process()
        try:
            return process.submit(function, *texts).result(timeout=_LIMIT)
        except OutOfTime:
            for child in list(process._processes.values()):
                child.kill()
            _process.cache_clear()
            return otherwise


@functools.lru_cache(4096)
def _parsed(text: str) -> list[Any]:
    import math_verify

    return math_verify.parse(text)


def _words(text: str) -> str | None:
    return str(found[-1]) if (found := _parsed(text)) else None


def _equal(one: str, other: str) -> bool:
    import math_verify

    return math_verify.verify(_parsed(one), _parsed(other))
