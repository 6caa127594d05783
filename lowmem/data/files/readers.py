"""Files become rows, each with the place it stands at, so that an error can name it.

    .txt .md            sections of about 4,000 characters, cut at blank lines
    .jsonl .ndjson      one object per line (`json_rows`)
    .json               a list of objects, and its other wrappings
    .csv .tsv           a header and one row per record; every cell is text (`tables`)
    .parquet .arrow     one row per record, also where `datasets` saved a folder of them

Each of them also compressed (`files`). A folder is read file by file, in the order of the
names (`folders`). Rows are plain dicts, all in memory: fine-tuning data is small beside
the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from lowmem.data.files import json_rows, tables
from lowmem.data.files.folders import DataFile, Found, find
from lowmem.data.files.source import Place, Row, suffixes, text_of

SECTION = 4000  # characters: at most about 1,000 tokens, so that a long text is more than one row


def read_path(path: Path, split: str = "train") -> Iterator[tuple[Place, Row]]:
    """Rows of a file, or of the files of a folder that belong to a split.

    Raises:
        UserError: no such path or split, nothing readable in it, or a damaged file (named with the line).
    """
    for file in held(path).of(split):
        yield from _read(file)


def look(path: Path) -> Found:
    """What a path holds, by names alone: nothing is read.

    Raises:
        UserError: no such path, or no data in it.
    """
    return find(path, READERS)


def held(path: Path) -> Found:
    """What a path holds; a JSON file named after no split may hold several.

    Raises:
        UserError: as `look`, or a file that cannot be read.
    """
    found = look(path)
    files, unread = list[DataFile](), list(found.unread)
    for file in found.files:
        is_json = suffixes(file.path)[0] == ".json" and file.path.is_file()
        parts, beside = json_rows.by_split(file) if is_json else ([file], [])
        files += parts
        unread += beside
    return replace(found, files=tuple(files), unread=tuple(unread))


def _read(file: DataFile) -> Iterator[tuple[Place, Row]]:
    if file.path.is_dir():
        return tables.saved(file.path)
    suffix = suffixes(file.path)[0]
    return json_rows.document(file) if suffix == ".json" else READERS[suffix](file.path)


def _sections(file: Path) -> Iterator[tuple[Place, Row]]:
    """A text in pieces of about `SECTION` characters, cut between paragraphs where possible."""
    parts: list[str] = []
    number = itertools.count(1)
    for paragraph in _paragraphs(text_of(file)):
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


def _json(file: Path) -> Iterator[tuple[Place, Row]]:
    return json_rows.document(DataFile(file, file.name, None))


READERS: dict[str, Callable[[Path], Iterator[tuple[Place, Row]]]] = {
    ".txt": _sections,
    ".md": _sections,
    ".jsonl": json_rows.lines,
    ".ndjson": json_rows.lines,
    ".json": _json,
    ".csv": tables.table,
    ".tsv": tables.table,
    ".parquet": tables.parquet,
    ".arrow": tables.arrow,
}
