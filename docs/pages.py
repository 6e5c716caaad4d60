"""Write what pages of this folder take from the code: `make docs`. A test fails where they disagree.

A page has marks, `<!-- flags: NAME -->` before a table and `<!-- end -->` after it; what is between them is made anew
from the code's own help texts. Names of metrics are looked up in the code, for docs/metrics.md to be held against.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from pathlib import Path

from bond_plugin import registry
from bond_plugin.algorithms import Algorithm, Config, RewardTransform
from bond_plugin.host import flags

DOCS = Path(__file__).resolve().parent
PACKAGE = Path(registry.__file__).parent
_BLOCK = re.compile(r"(<!-- flags: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_METRIC = re.compile(r"(bond|vbon|reward|timing|rollout)/[a-z_*]+|vllm_kl[a-z_*]*")

Row = tuple[str, str, str]


def flags_page() -> str:
    """docs/flags.md as it should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_table(_rows(block[2]))}{block[3]}", (DOCS / "flags.md").read_text())


def sections() -> list[str]:
    """What docs/flags.md must have a table of."""
    named = [*registry.names(registry.ADVANTAGE_ESTIMATORS), *registry.names(registry.REWARD_TRANSFORMS)]
    return ["run", "cache", "algorithm", *named]


def _rows(section: str) -> list[Row]:
    """(flag, default, meaning) of a section: `run`, `cache`, `algorithm` (what all have), or the name of one."""
    if section in ("run", "cache"):
        parser = argparse.ArgumentParser(add_help=False)
        flags.add_flags(parser, section, flags.RUN_FLAGS if section == "run" else flags.CACHE_FLAGS)
        return [_of_action(action) for action in parser._actions]
    if section == "algorithm":
        return [_of_field(name, f) for name, f in Config.options("bond").items()]
    if section in registry.names(registry.REWARD_TRANSFORMS):
        found = registry.load_class(registry.REWARD_TRANSFORMS, section, RewardTransform).Config
        return [_of_field(name, f) for name, f in found.options(section).items()]
    found = registry.load_class(registry.ADVANTAGE_ESTIMATORS, section, Algorithm).Config
    shared = {f.name for f in fields(Config)}
    return [_of_field(name, f) for name, f in found.options("bond").items() if f.name not in shared]


def _of_field(name: str, field: Field) -> Row:
    return f"--{name}", _shown(field.default), field.metadata["help"] + _choices(field.metadata.get("choices"))


def _of_action(action: argparse.Action) -> Row:
    text = (action.help or "").replace(" (default: %(default)s)", "") % vars(action)
    return action.option_strings[0], _shown(action.default), text + _choices(action.choices)


def _choices(values: Iterable[str] | None) -> str:
    """The values, where the text does not say them all."""
    return f" (one of {', '.join(f'`{value}`' for value in values)})" if values else ""


def _shown(default: object) -> str:
    if default in ("", None):
        return "none"
    return {True: "on", False: "off"}.get(default, str(default)) if isinstance(default, bool) else str(default)


def _table(rows: list[Row]) -> str:
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for name, default, text in rows:
        for given, shown in (("||", "‖"), ("|", "\\|"), ("<", "&lt;")):
            text = text.replace(given, shown)
        lines.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def metric_names() -> set[str]:
    """The metrics that the code writes; `*` stands for a part that is put in."""
    return {name for path in PACKAGE.rglob("*.py") if "recipes" not in path.parts for name in _named_in(path)}


def _named_in(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.JoinedStr):
            name = "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            name = node.value
        if _METRIC.fullmatch(name):
            yield name


if __name__ == "__main__":
    (DOCS / "flags.md").write_text(flags_page())
