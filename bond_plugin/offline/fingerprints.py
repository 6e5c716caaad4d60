"""Hashes by which two runs know that they mean the same model or the same file, whatever it is called.

They depend on content, not on names of folders or times of files: moving, copying and touching change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bond_plugin.files import read_json

_WHOLE = 64 * 2**20  # bytes: files up to this size are hashed whole
_PIECES = 256  # of larger ones, so many pieces at even distances
_PIECE = 4096  # bytes

# What changes in config.json when the same model is loaded and saved again.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def of_text(text: str) -> str:
    """A hash of a text: 16 hexadecimal digits, as all hashes here."""
    return _short(hashlib.sha256(text.encode("utf-8")))


def of_value(value: Any) -> str:
    """A hash of anything that JSON can say, whatever the order of its keys."""
    return of_text(json.dumps(value, sort_keys=True, default=str))


def of_file(path: str | Path) -> str:
    """A hash of a file's whole content. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):  # not the whole at once: it may be a dataset
            digest.update(piece)
    return _short(digest)


def of_model(name: str | Path) -> str | None:
    """A hash of a model's configuration and weights, in less than a second for 70B parameters on a local disk.

    Of a weight file larger than 64 MiB the size, its beginning (where safetensors lists the tensors) and 256 pieces
    at even distances are hashed: a change of a few numbers may go unnoticed, training does not. The same weights
    split into other files are another model. Of a name on Hugging Face's hub only a copy on this machine is looked
    at; ``None`` if the weights are not here.
    """
    folder = _folder(os.fspath(name))
    if folder is None:
        return None
    weights, content = _weight_files(folder), read_json(folder / "config.json")
    if not weights or content is None:
        return None
    digest = hashlib.sha256()
    kept = {key: value for key, value in content.items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for i in range(_PIECES):
                file.seek(i * (size - _PIECE) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return _short(digest)


def of_tokenizer(name: str | Path) -> str | None:
    """A hash of a model's tokenizer, chat template included, or ``None`` if it is not on this machine."""
    folder = _folder(os.fspath(name))
    if folder is None:
        return None
    patterns = ("*token*", "vocab*", "merges*", "chat_template*")
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return of_value([(path.name, of_file(path)) for path in sorted(files)])


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, ValueError, OSError):  # its own errors are ValueErrors and OSErrors
        return None


def _weight_files(folder: Path) -> list[Path]:
    """All of them, or none if the copy is not complete."""
    for pattern in ("*.safetensors", "*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            files = [folder / name for name in indexed(read_json(index))]
            return files if all(path.is_file() for path in files) else []
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def indexed(index: dict[str, Any] | None) -> list[str]:
    """The files of weights that the index of a model names; none if it is no index."""
    listed = (index or {}).get("weight_map")
    return sorted({name for name in listed.values() if isinstance(name, str)}) if isinstance(listed, dict) else []


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
