"""The answer that a response ends with.

For the votes of ``bond select`` a text, by the user's function or as the host's checker of sums writes it. For
``fobar`` read and compared by math-verify, in a process of its own: math-verify ends what takes too long only in a
main thread, and rewards are computed in others. Texts are exchanged, no expressions: putting 10^10^10 together again
would evaluate it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import Any, NamedTuple

from bond_plugin.host.watch import end_with_parent
from bond_plugin.words import reason, shorten

_FUNCTION = "answer_func"
_LIMIT = 60.0  # seconds, for what even a signal does not end
_lock = threading.Lock()

#: A response to its answer, ``None`` for none; equal answers are equal texts.
Parser = Callable[[str], str | None]


class SelectionError(RuntimeError):
    """The user's function cannot be loaded, failed or gave no text; or rewards with which no response is selected."""


def boxed_or_last_line(response: str) -> str | None:
    """What stands in the last ``\\boxed{}``, else the last line, as the host's checker of sums writes answers."""
    from openrlhf.utils.math_utils import extract_boxed_answer, mathd_normalize_answer

    found = extract_boxed_answer(response)
    if found is None:
        found = next((line for line in reversed(response.splitlines()) if line.strip()), "")
    return mathd_normalize_answer(found) or None


def parser(file: Path | None) -> Parser:
    """The parser of a Python file that defines ``answer_func(response) -> str | None``, or our own without a file.

    Raises SelectionError, now or when it is called, if it cannot be loaded or fails.
    """
    if file is None:
        return boxed_or_last_line
    try:
        function = runpy.run_path(os.fspath(file), run_name="bond_answers").get(_FUNCTION)
    except OSError as error:
        raise SelectionError(f"{file}: {reason(error)}") from error
    except (Exception, SystemExit) as error:
        raise SelectionError(f"{file}: {error!r}") from error
    if not callable(function):
        raise SelectionError(f"{file} defines no {_FUNCTION}(response)")

    def parse(response: str) -> str | None:
        try:
            found = function(response)
        except Exception as error:
            raise SelectionError(f"{file} failed on the response {shorten(response)}: {error!r}") from error
        if found is not None and not isinstance(found, str):
            raise SelectionError(
                f"{file} must give a text or None, and gave {shorten(found)} for {shorten(response)}"
            )
        return found or None

    parse("")
    return parse


class Answer(NamedTuple):
    """How a text ends: the answer in its words, and the text."""

    words: str
    text: str


def read(text: str) -> Answer | None:
    """The answer in ``\\boxed{}``, or after such words as "the answer is", or the last number. Needs math-verify."""
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
