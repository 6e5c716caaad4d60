"""Files that are there whole or not at all, and folders that one process writes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any


class Busy(RuntimeError):
    """Another process writes the folder. The message says which."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) under a temporary name beside ``path``, then rename it to ``path``.

    Who is stopped meanwhile leaves what was there before.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """The content of a JSON file, or ``None`` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def lock(folder: Path) -> IO[str]:
    """Be the only one who writes a folder, until the returned file is closed or this process has ended.

    Raises:
        Busy: another process is.
        OSError: the folder cannot be written, or its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".bond.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise Busy(f"{file.read().strip() or 'another process'} writes to {folder}") from error
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {started})")
    file.flush()
    return file
