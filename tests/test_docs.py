"""The documents: links lead somewhere, and the pages of flags and metrics are of the code as it is."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
METRICS = (REPOSITORY / "docs" / "metrics.md").read_text()


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", REPOSITORY / "docs" / "pages.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@cache
def text(path: Path) -> str:
    """A page without its code: what stands there is no link."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """What `#...` can name in a page, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text(path))):
        if re.match(r"\w+://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_link_is_dead(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One `and` two\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](gone.md) [c](there.md#one-and-two) [d](there.md#three) [e](#f) ![g](h.png)\n")
    assert dead_links(page) == ["gone.md", "there.md#three", "#f", "h.png"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_table_has_a_head(path: Path) -> None:
    """A blank line within a table makes plain text of the rest."""
    blocks = re.findall(r"(?:^\|.*\n)+", text(path), re.MULTILINE)
    assert [block for block in blocks if not re.match(r".*\n\|[ :|-]+\|\n", block)] == []


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("docs/*.md")), ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path: Path) -> None:
    """`host/weights.py`, say; results name files of their time."""
    named = set(re.findall(r"`(?!openrlhf/)([a-z][\w./-]*\.(?:py|yaml))(?:::\w+)?`", path.read_text()))
    folders = ("bond_plugin", "recipes", "tests", "benchmarks", "docs")
    there = [file.as_posix() for folder in folders for file in (REPOSITORY / folder).rglob("*.*")]
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in there)] == []


def test_no_picture_is_kept_that_no_page_shows() -> None:
    shown = {
        (path.parent / target).resolve()
        for path in PAGES
        for target in re.findall(r"!\[(?:\\.|[^\]\\])*\]\(([^)]+)\)", path.read_text())
    }
    assert set(REPOSITORY.glob("docs/**/*.png")) <= shown


def test_the_page_of_flags_is_the_codes(pages: ModuleType) -> None:
    page = (REPOSITORY / "docs" / "flags.md").read_text()
    assert sorted(re.findall(r"<!-- flags: (\S+) -->", page)) == sorted(pages.sections())
    assert page == pages.flags_page(), "make it anew: make docs"


def test_the_page_of_metrics_has_every_metric_and_no_other(pages: ModuleType) -> None:
    """Names with a part that is put in (`reward/*`) stand in the page one by one."""
    named = set(re.findall(r"`((?:\w+/)?\w+)`", "".join(re.findall(r"^\| (.+?) \|", METRICS, re.MULTILINE))))
    written = pages.metric_names()
    for name in written:
        assert any(fnmatch(found, name) for found in named), f"docs/metrics.md does not explain {name}"
    (host,) = importlib.util.find_spec("openrlhf").submodule_search_locations
    sources = "".join(path.read_text() for path in Path(host).rglob("*.py"))
    for found in named:
        ours = any(fnmatch(found, name) for name in written)
        assert ours or f'"{found}"' in sources, f"nothing logs {found}"
