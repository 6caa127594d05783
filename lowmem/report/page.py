"""A report as data (sections of tables and figures) and as one HTML page that needs nothing else.

The page holds its style, its pictures as inline SVG and its document as JSON; it loads nothing. A number of
bytes stands in the page as `data-bytes` beside what is written, so that a program can compare the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lowmem.report.charts.svg import STYLE
from lowmem.report.units import format_bytes, format_percent


@dataclass(frozen=True)
class Size:
    """A cell of bytes."""

    bytes: float | None
    signed: bool = False

    def __str__(self) -> str:
        return format_bytes(self.bytes, signed=self.signed)


@dataclass(frozen=True)
class Percent:
    """A cell with a signed error."""

    value: float | None

    def __str__(self) -> str:
        return format_percent(self.value)


class Right(str):
    """A cell of text that is aligned to the right, as numbers are."""


SHORT = 26  # a text cell up to this length stays on one line
_BREAKS, _BREAK = re.compile(r"(?<=[_,/.=(])"), "<wbr>"

Cell = str | int | Size | Percent | Right | None


@dataclass(frozen=True)
class Table:
    """Headings and rows; cells of bytes and numbers are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marks: Sequence[str] = ()  # one CSS class per row: good, warn, bad or empty


@dataclass(frozen=True)
class Figure:
    """A picture with its name above, its legend as (css class, name) and one line below."""

    svg: str
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, what it says in a sentence, its figures and tables."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()
    code: str = ""
    marked: Sequence[tuple[str, bool]] = ()  # text in pieces, and which of them are marked
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """What a page or a terminal shows.

    Args:
        title: heading of the page.
        verdict: the answer in one line.
        tone: good, warn, bad or plain.
        sections: the rest, most important first.
        data: the document that the numbers come from.
    """

    title: str
    verdict: str
    tone: str
    sections: Sequence[Section]
    data: Mapping[str, Any]


def html(report: Report) -> str:
    """The whole page."""
    # "<" as an escape: no text in the document can end the script element or start a comment.
    data = json.dumps(report.data, allow_nan=False).replace("<", "\\u003c")
    body = "\n".join(_section(section) for section in report.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(report.title)}</h1>\n"
        f'<p class="verdict {report.tone}">{escape(report.verdict)}</p>\n{body}\n</main>\n'
        f'<script type="application/json" id="report-data">{data}</script>\n</body></html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<p>{escape(section.text)}</p>" if section.text else ""]
    parts += [_figure(figure) for figure in section.figures]
    parts += [_table(table) for table in section.tables]
    if section.points:
        parts.append("<ul>" + "".join(f"<li>{escape(p)}</li>" for p in section.points) + "</ul>")
    if section.code:
        parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
    if section.marked:
        pieces = (f"<mark>{escape(t)}</mark>" if on else escape(t) for t, on in section.marked)
        parts.append(f'<pre class="text"><code>{"".join(pieces)}</code></pre>')
    inner = "\n".join(p for p in parts if p)
    if section.folded:
        return f"<details><summary>{escape(section.title)}</summary>\n{inner}\n</details>"
    return f"<section><h2>{escape(section.title)}</h2>\n{inner}\n</section>"


def _figure(figure: Figure) -> str:
    chips = "".join(
        f'<span class="chip"><svg viewBox="0 0 9 9"><rect width="9" height="9" rx="2" class="{css}"/></svg>'
        f"{escape(name)}</span>"
        for css, name in figure.legend
    )
    legend = f'<div class="legend">{chips}</div>' if chips else ""
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    title = f"<h3>{escape(figure.title)}</h3>" if figure.title else ""
    return f'<figure>{title}{legend}<div class="scroll">{figure.svg}</div>{caption}</figure>'


def _table(table: Table) -> str:
    right = [_numeric(table, i) for i in range(len(table.columns))]
    head = "".join(f"<th{_align(r)}>{escape(c)}</th>" for c, r in zip(table.columns, right, strict=True))
    marks = table.marks or [""] * len(table.rows)
    rows = []
    for row, mark in zip(table.rows, marks, strict=True):
        cells = "".join(_cell(*part) for part in zip(row, right, table.columns, strict=True))
        rows.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    kind = ' class="ranked"' if len(table.columns) > 3 else ""  # on a telephone each row is a list
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def _numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return all(cell is None or isinstance(cell, (Size, Percent, Right, int)) for cell in cells)


def _align(right: bool) -> str:
    return ' class="n"' if right else ""


def _cell(cell: Cell, right: bool, column: str) -> str:
    name = f' data-name="{escape(column)}"'
    exact = (
        f' data-bytes="{cell.bytes:.0f}" title="{cell.bytes:,.0f} bytes"'
        if isinstance(cell, Size) and cell.bytes is not None
        else ""
    )
    words = written(cell)
    if right or len(words) <= SHORT:
        return f'<td class="{"n" if right else "w"}"{name}{exact}>{escape(words)}</td>'
    return f"<td{name}{exact}>{_BREAKS.sub(_BREAK, escape(words))}</td>"


def written(cell: Cell) -> str:
    """A cell as text."""
    return "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell)
