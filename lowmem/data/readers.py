"""Files become rows, each with the place it stands at, so that an error can name it.

    .txt .md            sections of about 4,000 characters, cut at blank lines
    .jsonl .ndjson      one object per line
    .json               a list of objects, {"data": [...]}, or one object per line
    .csv .tsv           a header and one row per record; every cell is text
    .parquet            one row per record

A folder is read file by file, in the order of the names. Rows are plain dicts, all in
memory: fine-tuning data is small beside the model.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import UserError

Row = dict[str, Any]

SECTION = 4000  # characters: at most about 1,000 tokens, so that a long text is more than one row
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "heldout": "heldout",
    "test": "test",
}  # stem of a file -> split


@dataclass(frozen=True)
class Place:
    """Where a row stands: the file or data set, and what to call its number."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


def read_path(path: Path, split: str = "train") -> Iterator[tuple[Place, Row]]:
    """Rows of a file, or of the files of a folder that belong to a split.

    Raises:
        UserError: no such path, nothing readable in it, or a damaged file (named with the line).
    """
    for file in files_of(path, split):
        yield from READERS[file.suffix.lower()](file)


def files_of(path: Path, split: str | None = "train") -> list[Path]:
    """The data files of a path that belong to a split (None: all); a file named after none is train.

    Text files count only where there is nothing structured: a README beside data is not data.
    """
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; {_known()}")
        return [path]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in READERS)
    found = [f for f in found if f.suffix.lower() not in (".txt", ".md")] or found
    if not found:
        raise UserError(f"{path} holds no data: {_known()}")
    chosen = [f for f in found if split in (None, split_of(f))]
    if not chosen:
        raise UserError(
            f"{path} has no split {split!r}; it has {', '.join(sorted(set(map(split_of, found))))}"
        )
    return chosen


def split_of(file: Path) -> str:
    """The split that a file is named after (`test.jsonl`, `test-00000-of-00002.parquet`), else train."""
    match = re.fullmatch(r"([a-z_]+?)(-\d+.*)?", file.stem.lower())
    name = match[1] if match else ""
    name = SPLITS.get(name, name)
    return name if name in SPLITS.values() or name.startswith("heldout_") else "train"


def _known() -> str:
    return f"lowmem reads {', '.join(READERS)} and folders of them"


def _text(file: Path) -> str:
    """A file's text; a byte-order mark is dropped."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _sections(file: Path) -> Iterator[tuple[Place, Row]]:
    """A text in pieces of about `SECTION` characters, cut between paragraphs where possible."""
    parts: list[str] = []
    number = itertools.count(1)
    for paragraph in _paragraphs(_text(file)):
        if parts and sum(map(len, parts)) + len(paragraph) > SECTION:
            yield Place(str(file), "section", next(number)), {"text": "\n\n".join(parts)}
            parts = []
        parts.append(paragraph)
    if parts:
        yield Place(str(file), "section", next(number)), {"text": "\n\n".join(parts)}


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs without the blank lines between them; one longer than a section is cut."""
    for paragraph in re.split(r"\n\s*\n", text):
        stripped = paragraph.strip("\n").rstrip()
        for start in range(0, len(stripped), SECTION):
            yield stripped[start : start + SECTION]


def _lines(file: Path) -> Iterator[tuple[Place, Row]]:
    """One JSON object per line."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number} is not JSON: {error}") from error
            yield Place(str(file), "line", number), _object(row, f"{file}, line {number}")


def _json(file: Path) -> Iterator[tuple[Place, Row]]:
    """A list of objects, or lines that are objects in spite of the suffix."""
    text = _text(file)
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] == "{" and "\n{" in text.replace("\r", ""):
            yield from _lines(file)
            return
        raise UserError(f"{file} is not JSON: {error}") from error
    rows = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{file} holds no list of rows: give [{{...}}, ...] or one object per line")
    for number, row in enumerate(rows, 1):
        yield Place(str(file), "row", number), _object(row, f"{file}, row {number}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object with named fields")
    return row


def _table(file: Path) -> Iterator[tuple[Place, Row]]:
    """Comma- or tab-separated records under a header; an empty cell stays an empty text.

    Raises:
        UserError: a record with more cells than the header names, or what is no table.
    """
    import pandas  # type: ignore[import-untyped]

    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    text = _text(file)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            frame = pandas.read_csv(
                io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False
            )
    except pandas.errors.EmptyDataError:
        return
    except pandas.errors.ParserError as error:
        _refuse_long_record(file, text, separator)
        _refuse_open_quote(file, text, separator)
        raise UserError(f"cannot read {file}: {str(error).strip()}") from error
    if any(issubclass(warning.category, pandas.errors.ParserWarning) for warning in said):
        _refuse_long_record(file, text, separator)  # pandas cuts such records and only warns
    yield from _records(file, frame.to_dict("records"))


def _refuse_long_record(file: Path, text: str, separator: str) -> None:
    """Name the first record that says more than the header has names for; empty cells say nothing.

    Raises:
        UserError: there is one.
    """
    name = "tab" if separator == "\t" else "comma"
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
    field = re.compile(rf'"(?:[^"]++|"")*+("?)[^{separator}\n]*|[^{separator}\n]*')
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


def _parquet(file: Path) -> Iterator[tuple[Place, Row]]:
    """Records of a Parquet file, batch by batch."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from _records(file, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _records(file: Path, rows: Iterable[Mapping[Any, Any]]) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(rows, 1):
        yield Place(str(file), "row", number), {str(key): value for key, value in row.items()}


READERS: dict[str, Callable[[Path], Iterator[tuple[Place, Row]]]] = {
    ".txt": _sections,
    ".md": _sections,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
