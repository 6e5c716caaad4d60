"""Small helpers for messages."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from typing import Any


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean '...'?`` with the name that is nearest to ``word``, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def shorten(value: Any, width: int = 120) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def reason(error: OSError) -> str:
    """What the system has against a file, to follow its name."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "a folder, not a file"
        case NotADirectoryError() | FileExistsError():
            return "a file is where the folder should be"
    return error.strerror or str(error)


def timed() -> Callable[[str], None]:
    """What prints messages, each after the seconds since it was made."""
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)

    return say
