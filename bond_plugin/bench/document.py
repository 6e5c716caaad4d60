"""A document as a list of blocks, written as Markdown and as one HTML page that needs nothing beside itself.

All text is plain: what it contains of either language's marks is escaped.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: A cell of a table: text, or a number and its interval.
Entry = str | tuple[str, str]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    important: bool = False


@dataclass(frozen=True)
class Table:
    """Rows as long as the header. The first ``text_columns`` columns are text, the others numbers."""

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """``alt`` says what is to be seen, for those who cannot; the Markdown shows the file ``name.png``."""

    name: str
    alt: str
    caption: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Texts:
    """Texts side by side under a common title: (name, text) each."""

    title: str
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Log:
    """Text of a program, line by line."""

    name: str
    text: str


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


# HTML.

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ccc; }
.important { font-size: 1.1rem; font-weight: 600; border-left: .3rem solid #0072B2; padding-left: .8rem; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #444; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { vertical-align: bottom; border-bottom: 2px solid #888; min-width: 4rem; }
td, tbody th { white-space: nowrap; }
td.text { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
.text { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; }
td span { display: block; font-size: .75rem; color: #555; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  gap: .8rem; margin-bottom: 1.5rem; }
.texts > div { border: 1px solid #ccc; border-radius: .3rem; padding: .5rem .7rem; }
.texts h4, h3 { margin: 0 0 .3rem; font-size: .875rem; }
.texts p, pre { margin: 0; white-space: pre-wrap; font-size: .875rem; }
pre { background: #f4f4f4; padding: .6rem; overflow-wrap: anywhere; margin-bottom: 1rem; }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; width: 100%; }
  td, tbody th { white-space: normal; }
  thead th, td.text { min-width: 0; }
  th, td { padding: .15rem .3rem; }
  td span { font-size: 6.5pt; white-space: nowrap; }
  tbody th { position: static; }
  figure, tr, .texts > div { break-inside: avoid; }
  figure img { width: 80%; margin: 0 auto; }
  h2, h3, caption { break-after: avoid; }
}
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page: pictures are inside, and there is no script and no address that a browser would open."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text, important):
            marked = ' class="important"' if important else ""
            return f"<p{marked}>{escape(text)}</p>"
        case Table(name, header, rows, text_columns):
            classes = [' class="text"'] * text_columns + [""] * (len(header) - text_columns)
            head = "".join(f'<th scope="col"{c}>{escape(e)}</th>' for c, e in zip(classes, header, strict=True))
            lines = []
            for row in rows:
                first = f'<th scope="row" class="text">{escape(str(row[0]))}</th>'
                rest = "".join(f"<td{c}>{_entry(e)}</td>" for c, e in zip(classes[1:], row[1:], strict=True))
                lines.append(f"<tr>{first}{rest}</tr>")
            return (
                f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table>'
                f"<caption>{escape(name)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
                + "\n".join(lines)
                + "\n</tbody></table></div>"
            )
        case Picture(_, alt, caption, svg, _):
            source = base64.b64encode(svg).decode()
            return (
                f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{source}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        case Texts(heading, items):
            cards = "".join(f"<div><h4>{escape(name)}</h4><p>{escape(text)}</p></div>" for name, text in items)
            return f'<h3>{escape(heading)}</h3>\n<div class="texts">{cards}</div>'
        case Log(name, text):
            return f"<h3>{escape(name)}</h3>\n<pre>{escape(text)}</pre>"


def _entry(entry: Entry) -> str:
    if isinstance(entry, str):
        return html.escape(entry)
    return f"{html.escape(entry[0])}<span>{html.escape(entry[1])}</span>"
