"""docs/modes.md: every test that it names is there, and every mark in its table is explained."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "modes.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.startswith("| ")]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
    assert len(named) > 15
    for file, name in named:
        nodes = ast.walk(ast.parse((REPOSITORY / file).read_text()))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_mark_in_the_table_is_a_test() -> None:
    listed = {mark for line in PAGE.splitlines() if line.startswith("- [") for mark in re.findall(r"\[(\w+)\]", line)}
    used = set(re.findall(r"\[(\w+)\](?!\()", "\n".join(TABLE)))
    assert used - listed == set()
    assert listed - used == {"scripts"}


def test_every_cell_says_how_it_is_known() -> None:
    for row in TABLE[2:]:
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        assert len(cells) == 5, row
        for cell in cells[1:]:
            assert re.match(r"(run|unit) \[|read: |refused|as left|the default|–", cell), cell
