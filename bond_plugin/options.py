"""Flags made of the fields of a config, as every command shows them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field
from typing import Any


def parser(command: str, description: str, epilog: str, **more: Any) -> argparse.ArgumentParser:
    """The parser of a subcommand, whose help has both texts as they are."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"bond {command}", None, description, epilog, formatter_class=raw, **more)


def add_flag(group: Any, dotted: str, f: Field, **changes: Any) -> None:
    """Add the flag ``--<dotted>`` of a field of a :class:`bond_plugin.algorithms.Config`.

    Args:
        group: a parser, or a group of one.
        dotted: the flag's name without dashes.
        f: made by :func:`bond_plugin.algorithms.flag`.
        changes: ``default``, ``help`` or ``choices`` that differ from what the field says.
    """
    said = {"default": f.default, "help": "", "type": type(f.default), **f.metadata, **changes}
    default, text = said["default"], said["help"]
    kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if "choices" in said:
        kind = {"type": type(f.default), "choices": said["choices"]}
    elif not isinstance(f.default, bool):
        kind = {"type": said["type"], "metavar": {int: "N", float: "X"}.get(type(f.default), "TEXT")}
    text = f"{text} (default: {'none' if default == '' else default})".replace("%", "%%")
    group.add_argument(f"--{dotted}", default=default, help=text, **kind)


def number(text: str) -> float:
    """The type of a flag that is mostly a whole number: an int where it is one."""
    value = float(text)
    return int(value) if value.is_integer() else value


def last_value(argv: list[str], option: str) -> str | None:
    """What ``--option value`` or ``--option=value`` says in a command line, the last time it does; or ``None``."""
    value = None
    for i, token in enumerate(argv):
        if token == option and i + 1 < len(argv):
            value = argv[i + 1]
        elif token.startswith(option + "="):
            value = token.partition("=")[2]
    return value


def at_least(values: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Whether numbers are not too small.

    Args:
        values: by argparse's names; ``None`` for a flag that is not given.
        least: by the flags' names without dashes, the least that makes sense.

    Raises:
        ValueError: the first that is smaller.
    """
    for name, bound in least.items():
        value = values[name.replace("-", "_")]
        if value is not None and value < bound:
            raise ValueError(f"--{name} must be at least {bound}, got {value}")
