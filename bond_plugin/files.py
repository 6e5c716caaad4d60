"""Files that are there whole or not at all, JSON that says one thing, and folders that one process writes.

Every error says which file it is about: one of the system in :attr:`OSError.filename`, one of a content in its text.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bond_plugin.words import reason

_DEEPEST = 50  # lists and objects in one another
_CONTAINERS = (dict, list)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Busy(RuntimeError):
    """Another process writes the folder or the file. The message says which."""


class ContentError(ValueError):
    """A file holds what it must not. The message begins with its name."""


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system in here, such as a full disk, say that they are about ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def open_file(path: Path) -> IO[bytes]:
    """Open an ordinary file for reading. Raises OSError for a pipe or a device too, which may never end."""
    if not path.is_file() and path.exists() and not path.is_dir():
        raise OSError(errno.EINVAL, "not an ordinary file", os.fspath(path))
    return path.open("rb")


def unwritable(name: str | os.PathLike[str]) -> str | None:
    """Why a folder that is there or is to be made cannot be written, with its name; ``None`` if it can."""
    name = os.fspath(name)
    if not name or "\0" in name:
        return f"{name!r} is no name of a folder"
    path = Path(name)
    try:
        while not path.exists() and not path.is_symlink() and path != path.parent:
            path = path.parent
        if not path.exists():
            return f"{path}: a link that leads nowhere is where the folder should be"
        if not path.is_dir():
            return f"{path}: a file is where the folder should be"
        with tempfile.TemporaryFile(dir=path):
            return None
    except FileNotFoundError:  # of /proc and its like
        return f"{path}: nothing can be written into this folder"
    except OSError as error:
        return f"{path}: nothing can be written into this folder: {reason(error)}"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) under a temporary name beside ``path``, then rename it to ``path``.

    Who is stopped meanwhile leaves what was there before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # a full disk needs the room
        error.filename, error.filename2 = os.fspath(path), None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, ensure_ascii=False))


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file, an object or what ``kind`` says; ``None`` if there is no such file.

    Raises ContentError if it is no JSON, or of another kind.
    """
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes(), finite=False)
    except ValueError as error:
        raise ContentError(f"{path} {error}") from error
    if not isinstance(content, kind):
        raise ContentError(f"{path} is JSON, but no {'object' if kind is dict else kind.__name__}")
    return content


def parse_json(content: bytes, finite: bool = True) -> Any:
    """What JSON in UTF-8, with or without a byte-order mark, says, if it says it to every reader.

    With ``finite`` numbers that JSON has no word for (NaN, infinity), or that do not fit into 64 bits, are errors.
    Raises ValueError, whose message goes after the name of the file and the line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"has '{next(name for name in names if names.count(name) > 1)}' twice")
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"has the number {text[:40]}, which is not finite")
        return value

    def whole(text: str) -> int:
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise ValueError(f"has the number {text[:40]}, which does not fit into 64 bits")
        return int(text)

    # Without them json's own, which are in C: four times as fast on tokens and log-probabilities.
    hooks = {"parse_constant": number, "parse_float": number, "parse_int": whole} if finite else {}
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=unique, **hooks)
        if _deeper(found, _DEEPEST):
            raise RecursionError
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; save the file in that encoding") from error
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from error
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {_DEEPEST} levels") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than ``levels``."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(levels):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for each in inside for one in each if isinstance(one, _CONTAINERS)]
    return bool(level)


def lock(folder: Path) -> IO[str]:
    """Be the only one who writes a folder, until the returned file is closed or this process has ended.

    Raises Busy if another process is; OSError if it cannot be written, or its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".bond.lock"
    file = path.open("a+")
    try:
        with named(path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise Busy(f"{file.read().strip() or 'another process'} writes to {folder}") from error
    with named(path):
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} (since {started})")
        file.flush()
    return file


class LineFile(contextlib.AbstractContextManager):
    """JSON lines that this process alone appends to, each on the disk before :meth:`write` returns.

    The file is made if missing, with its folder; what it holds stays. Raises Busy if another process writes it;
    OSError if it cannot be written, or its file system knows no locks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            with named(self.path):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise Busy(f"{self.path}: another process is writing this file") from None
            error.strerror = f"{error.strerror}; name a file on another file system"
            raise

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def finished(self) -> Iterator[bytes]:
        """The lines that are there; after them, a last one that was not finished is taken away."""
        end = self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                end += len(line)
                yield line
        self._file.truncate(end)

    def write(self, item: Any) -> None:
        """Append one line."""
        with named(self.path):
            self._file.write(json.dumps(item, ensure_ascii=False, default=str).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
