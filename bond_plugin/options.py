"""Flags made of the fields of a config, as every command shows them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import Field
from typing import Any


def add_flag(group: Any, dotted: str, f: Field, **changes: Any) -> None:
    """Add the flag ``--<dotted>`` of a field of a :class:`bond_plugin.algorithms.Config`.

    Args:
        group: a parser, or a group of one.
        dotted: the flag's name without dashes.
        f: made by :func:`bond_plugin.algorithms.flag`.
        changes: arguments of ``add_argument`` that differ from what the field says.
    """
    default = changes.get("default", f.default)
    kind: dict[str, Any] = {"type": type(f.default), "choices": f.metadata.get("choices")}
    if kind["choices"] is None:
        kind["metavar"] = {int: "N", float: "X"}.get(kind["type"], "TEXT")
    if isinstance(f.default, bool):
        kind = {"action": argparse.BooleanOptionalAction}
    text = f"{changes.pop('help', f.metadata.get('help', ''))} (default: {'none' if default == '' else default})"
    group.add_argument(f"--{dotted}", **{"default": default, **kind, **changes, "help": text.replace("%", "%%")})


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` (did you mean …?)``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
