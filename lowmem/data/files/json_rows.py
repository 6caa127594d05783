"""Rows from JSON, in the wrappings that people give them.

one object per line                  .jsonl, .ndjson, and .json in spite of its name
lists of objects                     as a whole file, or as lines
{"data": [...]}, {"rows": [...]}     and other words for the same; what stands beside is named
{"train": [...], "test": [...]}      splits in one object, perhaps with "info" beside them
{"question": [...], "answer": [...]} columns instead of rows; their cells perhaps under numbers
{"0": {...}, "q-1": {...}}           rows under numbers, ids or, from three on, any names
[[{"role": ...}, ...], ...]          conversations without a name
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


def by_split(file: DataFile) -> tuple[list[DataFile], list[str]]:
    """The splits of an object of splits, each as a file of its own, else the file as it is.

    Returns:
        The files, and names of what else the object holds, which is not read.
    """
    try:
        text = text_of(file.path)
        value = texts.parse_json(text) if text.lstrip()[:1] == "{" else None
    except ValueError:
        return [file], []  # lines, or damage that reading will name
    if not isinstance(value, dict):
        return [file], []
    files, kept = [file], [_wrapper(value)] if _wrapper(value) else [*value]
    if file.split is None and _are_splits(value):
        kept = [key for key, part in value.items() if _is_split(key, part) or _is_table(part)]
        files = [DataFile(file.path, f"{file.name}: {key}", split_named(key), key) for key in kept]
    return files, [f"{file.name}: {key}" for key in value if key not in kept]


def _are_splits(value: dict[str, Any]) -> bool:
    """Whether an object holds splits; a column that is called `test` is none."""
    named = [key for key, part in value.items() if _is_split(key, part)]
    if not named or len(named) == len(value):
        return bool(named)
    return not _columns(value) and not any(_is_cells(value[key]) for key in named)


def _is_split(key: str, part: Any) -> bool:
    """Whether a field is named after a split; what is one row under `test-1` has that for its id."""
    one = any(map(str.isdecimal, key)) and (isinstance(part, dict) or _is_talk(part))
    return split_named(key) is not None and isinstance(part, (list, dict)) and not one


def _is_table(part: Any) -> bool:
    """Whether a field that no split is named after holds rows."""
    if isinstance(part, dict):
        return bool(_wrapper(part) or _columns(part) or _counted(part) or _keyed(part))
    return isinstance(part, list) and not _is_cells(part)


def _is_cells(part: Any) -> bool:
    """Whether a list, or a column as pandas writes it, holds something else than rows."""
    cells = part if isinstance(part, list) else part.values() if _is_counted(part) else ()
    return not all(isinstance(cell, dict) or _is_talk(cell) for cell in cells)


def _unwrapped(value: Any, source: str) -> list[Any]:
    """The rows of a whole document."""
    if isinstance(value, dict):
        wrapper = _wrapper(value)
        tables = _columns(value) or _counted(value) or _keyed(value)
        value = value[wrapper] if wrapper else tables or [value]
    if not isinstance(value, list):
        raise UserError(f"{source} holds no list of rows: give [{{...}}, ...] or one object per line")
    rows = [value] if _is_talk(value) else value
    return [{"messages": row} if _is_talk(row) else _unnumbered(row) for row in rows]


def _columns(value: dict[str, Any]) -> list[Row]:
    """Rows of an object of columns: lists of one length, or objects of cells under equal numbers."""
    columns = list(value.values())
    if columns and all(_is_counted(column) and column.keys() == columns[0].keys() for column in columns):
        columns = [list(column.values()) for column in columns]
    elif not _are_lists_of_cells(columns):
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _are_lists_of_cells(columns: list[Any]) -> bool:
    """Whether these are lists of one length, one of texts or conversations, and none of messages."""
    if not all(isinstance(column, list) and column and not _is_talk(column) for column in columns):
        return False
    texts_only = (all(isinstance(cell, str) for cell in column if cell is not None) for column in columns)
    said = any(texts_only) or any(all(map(_is_talk, column)) for column in columns)
    return said and len(set(map(len, columns))) == 1


def _counted(value: dict[str, Any]) -> list[Row]:
    """The rows of an object that numbers them."""
    return list(value.values()) if _is_counted(value) and _is_rows([*value.values()]) else []


def _keyed(value: dict[str, Any]) -> list[Row]:
    """The rows of an object that has them under ids: alike, and more than the parts of one row would be."""
    rows = list(value.values())
    if not (all(any(map(str.isdecimal, key)) for key in value) or len(rows) > 2):
        return []
    talks = bool(rows) and all(map(_is_talk, rows))
    alike = bool(rows) and all(isinstance(row, dict) for row in rows) and set.intersection(*map(set, rows))
    return rows if talks or alike else []


def _wrapper(value: dict[str, Any]) -> str:
    """The field under which an object has its rows; "" where none is named so."""
    return next((key for key in _WRAPPERS if _is_rows(value.get(key))), "")


def _is_counted(value: Any) -> bool:
    """Whether the fields of an object are numbers, as pandas writes rows and cells."""
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) or _is_talk(row) for row in value)


def _is_talk(value: Any) -> bool:
    """Whether a list is a conversation without a name."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return all({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys() for item in value)


def _unnumbered(row: Any) -> Any:
    """A row without what the Hub's viewer wraps it in."""
    is_numbered = isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row
    return row["row"] if is_numbered else row


def _rows(value: Any) -> list[Any]:
    """Rows of one line: itself, or those of a list."""
    if not isinstance(value, list) or not value or not _is_rows(value):
        return [value]
    return _unwrapped(value, "")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise UserError(
            f'{where} is {kind}, not an object with named fields: give {{"text": ...}} or the like'
        )
    return row
