"""Rows from tables: comma-separated text, Parquet, and what `datasets` writes.

The separator of a text is what its header shows: a comma, else a semicolon, a tab or a bar.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem.data.files.quotes import rewritten
from lowmem.data.files.source import Place, Row, content, refuse_pointer, suffixes, text_of
from lowmem.errors import UserError, first_line
from lowmem.texts import parse_json

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def table(file: Path) -> Iterator[tuple[Place, Row]]:
    """Records under a header; an empty cell stays an empty text.

    Raises:
        UserError: a record with more cells than the header names, or what is no table.
    """
    import pandas  # type: ignore[import-untyped]

    text = text_of(file)
    separator, text = _separator(text, "\t" if suffixes(file)[0] == ".tsv" else ",")
    text = rewritten(text, separator, str(file))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            frame = pandas.read_csv(
                io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False
            )
    except pandas.errors.EmptyDataError:
        return
    except (pandas.errors.ParserError, ValueError, OverflowError) as error:
        _refuse_long_record(file, text, separator)
        _refuse_open_quote(file, text, separator)
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    if any(issubclass(warning.category, pandas.errors.ParserWarning) for warning in said):
        _refuse_long_record(file, text, separator)  # pandas cuts such records and only warns
    yield from _records(file, frame.to_dict("records"))


def parquet(file: Path) -> Iterator[tuple[Place, Row]]:
    """Records of a Parquet file, batch by batch."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    refuse_pointer(file)
    source = io.BytesIO(content(file)) if suffixes(file)[1] else file
    try:
        with pyarrow.parquet.ParquetFile(source) as batches:
            yield from _records(file, (row for batch in batches.iter_batches() for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def arrow(file: Path) -> Iterator[tuple[Place, Row]]:
    """Records of an Arrow file, as `datasets` writes them."""
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    raw = content(file)
    is_file = raw.startswith(b"ARROW1")
    try:
        with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(raw) as batches:
            read = batches.read_all().to_batches()
        yield from _records(file, (row for batch in read for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def saved(folder: Path) -> Iterator[tuple[Place, Row]]:
    """Rows of a folder that `datasets` saved with `save_to_disk`."""
    from datasets import load_from_disk

    try:
        if not parse_json((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return  # a split without rows, which `datasets` writes and fails to load
        for file in sorted(folder.glob("*.arrow")):
            refuse_pointer(file)
        rows = load_from_disk(str(folder)).with_format(None)
        yield from _records(folder, rows)
    except Exception as error:  # datasets raises many kinds; each says in its first line what is wrong
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the data set saved in {folder}: {first_line(error)}") from error


def _separator(text: str, usual: str) -> tuple[str, str]:
    """What separates the fields of the header, and the text without the line in which Excel says so."""
    said = re.match(r"\s*sep=(.)\n", text)
    if said:
        return said[1], text[said.end() - 1 :]  # a blank line in its place: the numbers of lines stay
    header = re.sub(r'"[^"]*"', "", next((line for line in text.split("\n", 20) if line.strip()), ""))
    return next((mark for mark in (usual, *_SEPARATORS) if mark in header), usual), text


def _refuse_long_record(file: Path, text: str, separator: str) -> None:
    """Name the first record that says more than the header has names for; empty cells say nothing.

    Raises:
        UserError: there is one.
    """
    name = _SEPARATORS.get(separator, separator)
    remedy = f'put quotes ("...") around each field that holds a {name}'
    before = csv.field_size_limit(len(text) + 1)  # a whole book may stand in one cell
    try:
        records = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        header = next((record for record in records if record), [])
        start = records.line_num + 1
        for record in records:
            if any(record[len(header) :]):
                found = f"{len(record)} fields, the header {len(header)}"
                raise UserError(f"{file}, line {start} has {found}: {remedy}")
            start = records.line_num + 1
    finally:
        csv.field_size_limit(before)


def _refuse_open_quote(file: Path, text: str, separator: str) -> None:
    """Name the line of a field that begins with a quote and runs to the end of the file.

    Raises:
        UserError: there is one.
    """
    other = rf"[^{re.escape(separator)}\n]*"
    field = re.compile(rf'"(?:[^"]++|"")*+("?){other}|{other}')
    start = 0
    while start <= len(text):
        match = field.match(text, start)
        if match is None:
            return
        if match[1] == "":
            line = text.count("\n", 0, start) + 1
            raise UserError(
                f"{file}: the quote that opens in line {line} is not closed: "
                'end that field with ", and write a " inside of it as ""'
            )
        start = match.end() + 1


def _records(file: Path, rows: Iterable[Mapping[Any, Any]]) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(rows, 1):
        yield Place(str(file), "row", number), {str(key): value for key, value in row.items()}
