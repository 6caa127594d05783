"""Training data from anywhere, in the one form that TRL's SFTTrainer takes.

    "factbook"                     the demo data that ships with lowmem
    a file or a folder             text, JSONL, JSON, CSV, Parquet (`readers`)
    owner/name, owner/name:config  a data set of the Hugging Face Hub

The shape of the rows is recognised (`formats`) and returned, so that the caller can say it
aloud; every row is checked before training starts, and an error names its place. Nothing
is left out in silence: rows without an answer are skipped and counted, fields that no part
of a row is made from are named, and rows whose answers `seq_len` would cut off are counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.console import Console
from lowmem.data import hub as hub_data
from lowmem.data.examples import Example, answer_fits, ensure_chat_template, render_example
from lowmem.data.formats import Fields, Format, Row, RowError, detect_format, formats, named
from lowmem.data.readers import Place, files_of, read_path, split_of
from lowmem.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEMO",
    "Data",
    "Example",
    "detect_format",
    "ensure_chat_template",
    "fitting",
    "formats",
    "load_data",
    "load_rows",
    "render_example",
    "splits",
    "to_prompt_completion",
    "train_and_held_out",
]

DEMO = ("factbook",)


@dataclass(frozen=True)
class Data:
    """Rows ready for training.

    Attributes:
        name: what was asked for.
        split: which part of it.
        format: name of the recognised (or given) format.
        recognised: False where the caller gave the format.
        rows: `text`, or `prompt` and `completion`, in TRL's form.
        skipped: rows left out because their text or answer is empty.
        ignored: fields of the raw rows that hold something and are not used.
        too_long: rows left out because their answer lies beyond `seq_len` tokens (see `fitting`).
    """

    name: str
    split: str
    format: str
    recognised: bool
    rows: tuple[Row, ...]
    skipped: int = 0
    ignored: tuple[str, ...] = ()
    too_long: int = 0

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
        rows = f"{len(self.rows)} rows, {how} {self.format}{chat}{skipped}{long}{ignored}"
        return f"{self.name} ({self.split}): {rows}"

    def dataset(self) -> Dataset:
        """The rows as a `datasets.Dataset` for TRL."""
        from datasets import Dataset

        return Dataset.from_list(list(self.rows))

    def first(self, count: int, seed: int | None = None) -> Data:
        """At most `count` rows: the first ones, or with a seed a random choice in order."""
        if seed is None or count >= len(self.rows):
            return replace(self, rows=self.rows[:count])
        chosen = sorted(random.Random(seed).sample(range(len(self.rows)), count))
        return replace(self, rows=tuple(self.rows[i] for i in chosen))


def load_data(
    name_or_path: str, *, data_format: str | None = None, split: str = "train", limit: int | None = None
) -> Data:
    """Load, recognise, check and convert data.

    Args:
        name_or_path: "factbook", a file, a folder, or a Hub name (`owner/name` or `owner/name:config`).
        data_format: overrides the recognition; see `formats()`.
        split: train, validation, heldout, test; files not named after any split count as train.
        limit: read this many rows at most.

    Raises:
        UserError: nothing there, unknown format, damaged file, or a bad row (named with its place).

    Example:
        >>> load_data("factbook", split="validation").rows[0]["prompt"][0]["role"]
        'user'
    """
    chosen = named(data_format) if data_format else None
    rows: list[Row] = []
    skipped, ignored = 0, dict[str, None]()
    for place, raw in islice(load_rows(name_or_path, split), limit):
        chosen = chosen or detect_format(raw, str(place))
        converted, unread = _convert(chosen, raw, place)
        if converted:
            ignored |= dict.fromkeys(unread)
        skipped += not converted
        rows += converted
        if converted and type(converted[0].get("prompt")) is not type(rows[0].get("prompt")):
            raise UserError(f"{place}: prompts are text in some rows and messages in others; use one of them")
    if not rows or not chosen:
        empty = f"all {skipped} rows are empty" if skipped else "it holds no rows"
        raise UserError(f"{name_or_path} ({split}) has nothing to train on: {empty}")
    recognised = data_format is None
    return Data(str(name_or_path), split, chosen.name, recognised, tuple(rows), skipped, tuple(ignored))


def load_rows(name_or_path: str, split: str = "train") -> Iterator[tuple[Place, Row]]:
    """Raw rows one by one, each with its place, as they stand in the file or on the Hub.

    Raises:
        UserError: nothing of that name, no such split, or a damaged file.
    """
    path = _path(name_or_path)
    if path is not None:
        yield from read_path(path, split)
    else:
        check_name(name_or_path)
        yield from hub_data.read_hub(name_or_path, split)


def check_name(name_or_path: str) -> None:
    """Look whether there may be data of a name; nothing is read, and nobody asked.

    Raises:
        UserError: neither a file, nor a folder, nor like a name on the Hub.
    """
    path = _path(name_or_path)
    if path is not None:
        files_of(path, None)
    elif not hub_data.looks_like_hub(name_or_path):
        kind = "file or folder" if Path(name_or_path).suffix or "/" in name_or_path else "data"
        raise UserError(
            f"no {kind} {name_or_path!r}: give a file, a folder, a Hub name (owner/name) or the demo data; "
            f"{nearest(name_or_path, DEMO)}"
        )


def splits(name_or_path: str) -> tuple[str, ...]:
    """Splits that a path has: those that a folder's files are named after, else `train`.

    >>> splits("factbook")
    ('heldout', 'heldout_reserved', 'train', 'validation')
    """
    path = _path(name_or_path)
    if path is None or not path.is_dir():
        return ("train",)
    return tuple(sorted({split_of(file) for file in files_of(path, None)}))


def train_and_held_out(
    data: str,
    held_out: str | None = None,
    *,
    data_format: str | None = None,
    rows: int = 80,
    seed: int = 0,
) -> tuple[Data, Data]:
    """Rows to train on, and rows to evaluate on that are not among them.

    The held-out rows are those of `held_out`; else those of the data's own held-out, validation or test
    split; else a random tenth of the data (at most `rows`), taken out of training.

    Args:
        data: as for `load_data`.
        held_out: other data to evaluate on.
        data_format: of both.
        rows: most rows to evaluate on.
        seed: of the choice.

    Raises:
        UserError: as `load_data`; or a single row, which cannot be split.
    """
    train = load_data(data, data_format=data_format)
    if held_out is not None:
        split = _held_out_split(held_out) or "train"
        return train, load_data(held_out, data_format=data_format, split=split).first(rows, seed)
    own = _held_out_split(data)
    if own is not None:
        return train, load_data(data, data_format=data_format, split=own).first(rows, seed)
    return _take_out(train, rows, seed)


def fitting(data: Data, tokenizer: PreTrainedTokenizerBase, seq_len: int, console: Console) -> Data:
    """The rows that have something to learn within `seq_len` tokens, where training cuts them.

    TRL drops the others without a word, or with packing gives them room in which nothing is learned.

    Args:
        data: rows as loaded.
        tokenizer: the one they are trained with.
        seq_len: tokens per row.
        console: told how many rows are left out.

    Raises:
        UserError: no row is left, or the chat template refuses one.
    """
    kept = tuple(row for row in data.rows if answer_fits(row, tokenizer, seq_len))
    count, of = len(data.rows) - len(kept), f"{data.name} ({data.split})"
    if not kept:
        raise UserError(
            f"{of}: none of the {count} rows has an answer left within seq_len {seq_len}: raise seq_len"
        )
    if count:
        rows = f"{count} of {len(data.rows)} rows have"
        console.say(f"{of}: {rows} no answer left within seq_len {seq_len} and are left out: raise seq_len")
    return replace(data, rows=kept, too_long=count)


def to_prompt_completion(row: Mapping[str, Any], data_format: str | None = None) -> list[Row]:
    """Convert one row; several where a conversation has several answers, none for an empty answer.

    Raises:
        UserError: the row fits no format, or lacks a field of the given one.

    Example:
        >>> to_prompt_completion({"question": "2 + 2?", "answer": "4"})[0]["completion"]
        [{'role': 'assistant', 'content': '4'}]
    """
    chosen = named(data_format) if data_format else detect_format(row)
    return _convert(chosen, row, Place("the data", "row", 1))[0]


def _convert(chosen: Format, raw: Mapping[str, Any], place: Place) -> tuple[list[Row], list[str]]:
    """Rows for TRL, and the raw row's fields that they are not made from."""
    fields = Fields(raw)
    try:
        return chosen.convert(fields), fields.unread()
    except RowError as error:
        raise UserError(f"{place} ({chosen.name}): {error}") from error


def _path(name_or_path: str) -> Path | None:
    """The local path that is meant, None for what is not one."""
    if name_or_path in DEMO:
        folder = resources.files("lowmem.configs") / "data" / name_or_path
        return Path(str(folder))
    path = Path(name_or_path).expanduser()
    return path if path.exists() else None


def _held_out_split(name_or_path: str) -> str | None:
    """The split to evaluate on, if the data has one."""
    return next((s for s in ("heldout", "validation", "test") if s in splits(name_or_path)), None)


def _take_out(data: Data, rows: int, seed: int) -> tuple[Data, Data]:
    """Part a data set at random, without overlap."""
    count = min(rows, max(1, len(data.rows) // 10))
    if len(data.rows) < 2:
        raise UserError(f"{data.name} has one row: give at least two, or held-out rows with --eval-data")
    chosen = set(random.Random(seed).sample(range(len(data.rows)), count))
    parts: Iterable[list[Row]] = (
        [row for i, row in enumerate(data.rows) if (i in chosen) == wanted] for wanted in (False, True)
    )
    kept, held = (replace(data, rows=tuple(part), skipped=0) for part in parts)
    return replace(kept, skipped=data.skipped), replace(held, split="held out")
