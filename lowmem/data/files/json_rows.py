"""Rows from JSON, in the wrappings that people give them.

one object per line                  .jsonl, .ndjson, and .json in spite of its name
lists of objects                     as a whole file, or as lines
{"data": [...]}, {"rows": [...]}     and other words for the same
{"train": [...], "test": [...]}      splits in one object
{"question": [...], "answer": [...]} columns instead of rows
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem import texts
from lowmem.data.files.folders import DataFile, split_named
from lowmem.data.files.source import Place, Row, text_of
from lowmem.errors import UserError

_WRAPPERS = ("data", "rows", "examples", "instances")


def lines(file: Path) -> Iterator[tuple[Place, Row]]:
    """One object per line; a line that is a list of objects is several rows."""
    text = text_of(file)
    if (
        text.lstrip().partition("\n")[0].strip() == "["
    ):  # a whole list over many lines, in spite of the suffix
        yield from document(DataFile(file, file.name, None))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = Place(str(file), "line", number)
            try:
                value = texts.parse_json(line)
            except ValueError as error:
                raise UserError(f"{place} is not JSON: {error}; give one object per line") from error
            rows = _rows(value)
            for item, row in enumerate(rows, 1):
                where = Place(str(file), f"line {number}, row", item) if len(rows) > 1 else place
                yield where, _object(row, str(where))


def document(file: DataFile) -> Iterator[tuple[Place, Row]]:
    """A list of objects, columns, one split of several, or lines that are objects in spite of the suffix."""
    text = text_of(file.path)
    try:
        value = texts.parse_json(text)
    except ValueError as error:
        if text.lstrip()[:1] == "{" and "\n{" in text:
            yield from lines(file.path)
            return
        raise UserError(f"{file.path} is not JSON: {error}") from error
    source = str(file.path)
    if file.key is not None:
        value, source = value[file.key], f"{source} ({file.key})"
    for number, row in enumerate(_unwrapped(value, source), 1):
        yield Place(source, "row", number), _object(row, f"{source}, row {number}")


def by_split(file: DataFile) -> list[DataFile]:
    """The splits of an object of splits, each as a file of its own; else the file as it is."""
    text = text_of(file.path)
    try:
        value = texts.parse_json(text) if text.lstrip()[:1] == "{" else None
    except ValueError:
        return [file]  # lines, or damage that reading will name
    if not isinstance(value, dict) or not all(isinstance(part, (list, dict)) for part in value.values()):
        return [file]
    if not any(split_named(key) for key in value):
        return [file]
    return [DataFile(file.path, f"{file.name}: {key}", split_named(key), key) for key in value]


def _unwrapped(value: Any, source: str) -> list[Any]:
    """The rows of a whole document."""
    if isinstance(value, dict):
        value = next(
            (value[key] for key in _WRAPPERS if _is_rows(value.get(key))), _columns(value) or [value]
        )
    if not isinstance(value, list):
        raise UserError(f"{source} holds no list of rows: give [{{...}}, ...] or one object per line")
    return [row.get("row", row) if _is_numbered(row) else row for row in value]


def _columns(value: dict[str, Any]) -> list[Row]:
    """Rows of an object of columns: lists of texts, all of one length."""
    lists = list(value.values())
    if not lists or not all(isinstance(column, list) for column in lists):
        return []
    if len({len(column) for column in lists}) > 1 or not all(isinstance(x, str) for x in lists[0]):
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _is_numbered(row: Any) -> bool:
    """Whether a row is wrapped as the Hub's viewer gives it."""
    return isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row


def _rows(value: Any) -> list[Any]:
    """Rows of one line: itself, the objects of a list, or a conversation without a name."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return [value]
    if all({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys() for item in value):
        return [{"messages": value}]
    return value


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object with named fields")
    return row
