"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
