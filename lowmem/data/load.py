"""Training data from anywhere, in the one form that TRL's SFTTrainer takes.

    "factbook"                     the demo data that ships with lowmem
    a file or a folder             text, JSONL, JSON, CSV, Parquet (`readers`)
    owner/name, owner/name:config  a data set of the Hugging Face Hub

The shape of the rows is recognised (`formats`) and returned, so that the caller can say it
aloud; every row is checked before training starts, and an error names its place. Nothing
is left out in silence: rows without an answer are skipped and counted, files that are not
read and fields that no part of a row is made from are named, and rows whose answers `seq_len`
would cut off are counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lowmem.data.examples import Example, ensure_chat_template, render_example
from lowmem.data.files.folders import listed
from lowmem.data.files.source import Place
from lowmem.data.lookup import DEMO, check_name, files_by_split, files_read, load_rows, not_read, splits
from lowmem.data.rows import preferences
from lowmem.data.rows.columns import Columns, understood
from lowmem.data.rows.fields import Fields, RowError
from lowmem.data.rows.formats import BETTER, WORSE, Format, Row, detect_format, formats, named
from lowmem.data.rows.switches import of_row
from lowmem.errors import UserError, nearest

__all__ = [
    "DEMO",
    "Data",
    "Example",
    "NoRowsError",
    "check_name",
    "detect_format",
    "ensure_chat_template",
    "files_by_split",
    "formats",
    "load_data",
    "load_rows",
    "render_example",
    "splits",
    "to_prompt_completion",
]


class NoRowsError(UserError):
    """Data that holds no row to learn from."""


@dataclass(frozen=True)
class Data:
    """Rows ready for training.

    Attributes:
        name: what was asked for.
        split: which part of it.
        format: name of the recognised (or given) format.
        recognised: False where the caller gave the format.
        rows: `text`, or `prompt` and `completion`, in TRL's form.
        skipped: rows left out because their text or answer is empty; `notes` name those of weight 0.
        ignored: fields of the raw rows that hold something and are not used.
        too_long: rows left out because their answer lies beyond `seq_len` tokens (see `fitting`).
        places: where each row stands; rows of one record have one place. () where nobody knows.
        files: of a folder, the names of those read and the records in each.
        notes: what else should be known about the choice of the rows, a few words each.
    """

    name: str
    split: str
    format: str
    recognised: bool
    rows: tuple[Row, ...]
    skipped: int = 0
    ignored: tuple[str, ...] = ()
    too_long: int = 0
    places: tuple[Place, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def conversational(self) -> bool:
        """Whether the model's chat template renders the rows."""
        return isinstance(self.rows[0].get("prompt"), list)

    @property
    def packing_strategy(self) -> str:
        """TRL's packing: texts are wrapped, since best-fit packing cuts off what exceeds a row."""
        return "wrapped" if self.format == "text" else "bfd"

    def summary(self) -> str:
        """One line to say aloud.

        >>> load_data("factbook").summary()  # doctest: +ELLIPSIS
        'factbook (train): 1558 rows, recognised as prompt_completion (chat messages); ignored fields: ...'
        """
        how = "recognised as" if self.recognised else "read as"
        chat = " (chat messages)" if self.conversational else ""
        skipped = f"; {self.skipped} without an answer skipped" if self.skipped else ""
        long = f"; {self.too_long} with the answer beyond seq_len left out" if self.too_long else ""
        ignored = f"; ignored fields: {', '.join(self.ignored)}" if self.ignored else ""
        read = listed([f"{name} ({count})" for name, count in self.files])
        more = "".join(f"; {note}" for note in ([f"files: {read}"] if read else []) + list(self.notes))
        rows = f"{len(self.rows)} rows, {how} {self.format}{chat}{skipped}{long}{ignored}{more}"
        return f"{self.name} ({self.split}): {rows}"

    def first(self, count: int, seed: int | None = None) -> Data:
        """At most `count` rows: the first ones, or with a seed a random choice in order."""
        if seed is None or count >= len(self.rows):
            return self.only(range(min(count, len(self.rows))))
        return self.only(sorted(random.Random(seed).sample(range(len(self.rows)), count)))

    def only(self, indices: Iterable[int], **changes: Any) -> Data:
        """The rows of these indices, each with its place, and other values changed."""
        chosen = list(indices)
        places = tuple(self.places[i] for i in chosen) if self.places else ()
        return replace(self, rows=tuple(self.rows[i] for i in chosen), places=places, **changes)


def load_data(
    name_or_path: str,
    *,
    data_format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    task: str = "sft",
    columns: Mapping[str, str] | None = None,
) -> Data:
    """Load, recognise, check and convert data.

    Args:
        name_or_path: "factbook", a file, a folder, or a Hub name (`owner/name` or `owner/name:config`).
        data_format: overrides the recognition; see `formats()`.
        split: train, validation, heldout, test; files not named after any split count as train.
        limit: read this many rows at most.
        task: what the rows are for; sft learns answers, see `preferences` for the others.
        columns: what fields of a format are called in the rows, as in {"question": "Frage"}.

    Raises:
        UserError: nothing there, unknown format, damaged file, or a bad row (named with its place).
        NoRowsError: nothing to train on in it.

    Example:
        >>> load_data("factbook", split="validation").rows[0]["prompt"][0]["role"]
        'user'
    """
    chosen = _named(task, data_format) if data_format else None
    got = _Gathered()
    passed = _passed_over(columns or {}) if task == "sft" else frozenset()
    for place, whole in islice(load_rows(name_or_path, split), limit):
        raw = {key: value for key, value in whole.items() if key not in passed}
        got.ignored |= dict.fromkeys(key for key in whole if key in passed)
        raw = dict(_renamed(raw, columns or {}, place))
        said = of_row(raw) if task != "grpo" else {}  # what rewards are computed from may have these names
        if not all(said.values()):
            got.skipped["of weight 0"] += 1
            continue
        found = _columns({key: raw[key] for key in raw if key not in said}, place, chosen, task)
        chosen = chosen or _detect(task, found, str(place))
        got.add(place, found, *_convert(chosen, found, place))
    if not got.rows or not chosen:
        use = "train" if split == "train" else "evaluate"
        raise NoRowsError(f"{name_or_path} ({split}) has nothing to {use} on: {got.why_not()}")
    return Data(
        str(name_or_path),
        split,
        chosen.name,
        data_format is None,
        tuple(got.rows),
        got.skipped[""],
        tuple(got.ignored),
        places=tuple(got.places),
        files=files_read(name_or_path, got.places),
        notes=(
            *(f"{count} {why} left out" for why, count in got.skipped.items() if why),
            *_other_names({**(columns or {}), **got.names}),
            *(not_read(name_or_path) if split == "train" else ()),
        ),
    )


class _Gathered:
    """What has been read of some data: rows, their places, and what is left out or has another name."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.places: list[Place] = []
        self.skipped = Counter[str]()
        self.ignored: dict[str, None] = {}
        self.names: dict[str, str] = {}

    def add(self, place: Place, found: Columns, converted: list[Row], fields: Fields) -> None:
        """Keep what one record was converted to."""
        if not converted:
            self.skipped[fields.why] += 1
            return
        self.names |= {new: old for new, old in found.called.items() if fields.was_read(new)}
        self.ignored |= dict.fromkeys(_unused(found, fields))
        self.rows += converted
        self.places += [place] * len(converted)
        if type(converted[0].get("prompt")) is not type(self.rows[0].get("prompt")):
            raise UserError(f"{place}: prompts are text in some rows and messages in others; use one of them")

    def why_not(self) -> str:
        """Why there are no rows."""
        if not self.skipped:
            return "it holds no rows"
        if set(self.skipped) == {""}:
            return f"all {self.skipped['']} rows are empty"
        return "; ".join(f"{count} rows {why or 'are empty'}" for why, count in self.skipped.items())


def _unused(columns: Columns, fields: Fields) -> list[str]:
    """What of a record no row is made from."""
    return [*map(columns.original, fields.unread()), *columns.left]


def to_prompt_completion(row: Mapping[str, Any], data_format: str | None = None) -> list[Row]:
    """Convert one row; several where a conversation has several answers, none for an empty answer.

    Raises:
        UserError: the row fits no format, or lacks a field of the given one.

    Example:
        >>> to_prompt_completion({"question": "2 + 2?", "answer": "4"})[0]["completion"]
        [{'role': 'assistant', 'content': '4'}]
    """
    place = Place("the data", "row", 1)
    chosen = named(data_format) if data_format else None
    said = of_row(row)
    if not all(said.values()):
        return []
    columns = _columns({key: row[key] for key in row if key not in said}, place, chosen)
    chosen = chosen or detect_format(columns.row, called=columns.called)
    return _convert(chosen, columns, place)[0]


def _named(task: str, name: str) -> Format:
    return named(name) if task == "sft" else preferences.named_for(task, name)


def _detect(task: str, found: Columns, source: str) -> Format:
    if task == "sft":
        return detect_format(found.row, source, found.called)
    return preferences.detect_for(task, found.row, source)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> Mapping[str, Any]:
    """A row with its columns named as the caller says; a field that had the new name gives way."""
    if missing := [old for old in columns.values() if old not in row]:
        raise UserError(
            f"{place} has no column {missing[0]!r} (--columns); {nearest(missing[0], map(str, row))}"
        )
    back = {old: new for new, old in columns.items()}
    return {back.get(key, key): value for key, value in row.items() if key in back or key not in columns}


def _passed_over(columns: Mapping[str, str]) -> frozenset[str]:
    """Worse answers, where the caller says that the better one is the answer."""
    return frozenset(WORSE) - set(columns.values()) if set(BETTER) & set(columns.values()) else frozenset()


def _columns(raw: Mapping[str, Any], place: Place, chosen: Format | None, task: str = "sft") -> Columns:
    try:
        return understood(raw, chosen) if task == "sft" else preferences.judged(raw)
    except RowError as error:
        raise UserError(f"{place}: {error}") from error


def _convert(chosen: Format, columns: Columns, place: Place) -> tuple[list[Row], Fields]:
    """Rows for TRL, and the fields that they are made from."""
    fields = Fields(columns.row)
    try:
        converted = chosen.convert(fields)
    except RowError as error:
        read = ", ".join((chosen.name, *_other_names(columns.called)))
        raise UserError(f"{place} ({read}): {error}") from error
    for text in _texts(converted):
        if (at := _half_character(text)) is not None:
            around = text[max(0, at - 20) : at + 20]
            raise UserError(f"{place}: {around!r} holds half a character (a lone surrogate): take it out")
    return converted, fields


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _half_character(text: str) -> int | None:
    """Where a text holds half of a pair of UTF-16, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _other_names(names: Mapping[str, str]) -> tuple[str, ...]:
    """A note about columns that are read under another name than their own."""
    other = [f"{old} as {new}" for new, old in names.items() if old.strip().lower() != new]
    return (f"read {', '.join(other)}",) if other else ()
