"""A document as a list of blocks, written as Markdown and as one HTML page that needs nothing beside itself.

All text is plain: what it contains of either language's marks is escaped.
"""

from __future__ import annotations

import base64
import html
import re
from collections import namedtuple
from collections.abc import Sequence

import jinja2

#: A cell of a table: text, or a number and its interval.
Entry = str | tuple[str, str]

Heading = namedtuple("Heading", "text")
Paragraph = namedtuple("Paragraph", "text important", defaults=[False])
#: Rows as long as the header. The first ``text_columns`` columns are text, the others numbers.
Table = namedtuple("Table", "name header rows text_columns", defaults=[1])
#: ``alt`` says what is to be seen, for those who cannot; the Markdown shows the file ``name.png``.
Picture = namedtuple("Picture", "name alt caption svg png")
#: Texts side by side under a common title: (name, text) each.
Texts = namedtuple("Texts", "title texts")
#: Text of a program, line by line.
Log = namedtuple("Log", "name text")

Block = Heading | Paragraph | Table | Picture | Texts | Log


# Markdown.


def to_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """GitHub's Markdown. ``pictures`` is the folder of the PNG files, relative to the document."""
    parts = [f"# {_mark(title)}", *(_markdown(block, pictures) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text):
            return f"## {_mark(text)}"
        case Paragraph(text, important):
            return f"**{_mark(text)}**" if important else _mark(text)
        case Table(name, header, rows, text_columns):
            line = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
            lines = [[_mark(entry) for entry in header], line]
            lines += [[_mark(e) if isinstance(e, str) else _mark(" ".join(e)) for e in row] for row in rows]
            return "\n".join([f"**{_mark(name)}**", "", *(f"| {' | '.join(entries)} |" for entries in lines)])
        case Picture(name, alt, caption, _, _):
            return f"![{_mark(alt)}]({pictures}/{name}.png)\n\n{_mark(caption)}"
        case Texts(heading, items):
            quoted = (f"- {_mark(name)}\n\n{_quote(text)}" for name, text in items)
            return "\n\n".join([f"**{_mark(heading)}**", *quoted])
        case Log(name, text):
            longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"**{_mark(name)}**\n\n{fence}text\n{text}\n{fence}"


def _mark(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\s*\n\s*", " ", escaped)


def _quote(text: str) -> str:
    lines = [re.sub(r"^(\s*)([#+>-]|\d+[.)])", r"\1\\\2", _mark(line)) for line in text.splitlines()]
    return "\n".join(f"  > {line}\\" if line.strip() else "  >" for line in lines).rstrip("\\")


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page: pictures are inside, and there is no script and no address that a browser would open."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bond_plugin.bench", "."), autoescape=True, keep_trailing_newline=True
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template("report.html").render(title=title, blocks=blocks)
