"""A report in the terminal: its verdict and its tables, the same numbers as on the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from . import render

_TONES = {"good": "green", "warn": "yellow", "bad": "red", "plain": "default"}


def renderables(report: Any) -> list[Any]:
    """Verdict, then the tables and points of every section that is not folded away on the page.

    Args:
        report: from `lowmem.report.build`.
    """
    return [Text(report.verdict, style=f"bold {_TONES[report.tone]}"), *_sections(report)]


def _sections(report: Any) -> Iterator[Any]:
    for section in report.sections:
        if section.folded:
            continue
        yield from (tabulated(section.title, table) for table in section.tables)
        if section.points:
            yield Text(section.title, style="bold")
            yield from (Text(f"  - {point}") for point in section.points)


def tabulated(title: str, table: Any) -> Any:
    """A table of a report; columns of nothing but numbers are set to the right."""
    from lowmem.report.page import Percent, Right, Size, written

    numeric = (Size, Percent, Right, int, type(None))
    cells = [[written(cell) for cell in row] for row in table.rows]
    numbers = [all(isinstance(cell, numeric) for cell in column) for column in zip(*table.rows, strict=True)]
    right = [name for name, of_numbers in zip(table.columns, numbers, strict=True) if of_numbers]
    return render.table(title, table.columns, cells, right=right)
