"""Rows to train on and rows to evaluate on, without anything on both sides.

A record (one line of a file: perhaps a conversation that became several rows) goes to one
side as a whole, and so do all records that have a row in common: what was learned by heart
would look like what was understood.
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowmem.data.files.folders import listed
from lowmem.data.load import Data, NoRowsError, files_by_split, load_data, splits


def train_and_held_out(
    data: str,
    held_out: str | None = None,
    *,
    data_format: str | None = None,
    rows: int = 80,
    seed: int = 0,
    task: str = "sft",
    columns: Mapping[str, str] | None = None,
) -> tuple[Data, Data]:
    """Rows to train on, and rows to evaluate on that are not among them.

    The held-out rows are those of `held_out`; else those of the data's own held-out, validation or test
    split, one without rows passed over and named; else a random tenth of the data (at most `rows`), taken
    out of training record by record. Rows that are also trained on are left out, or said to be where there
    are no others.

    Args:
        data: as for `load_data`.
        held_out: other data to evaluate on.
        data_format: of both.
        rows: most rows to evaluate on.
        seed: of the choice.
        task: as for `load_data`, like `columns`.
        columns: of both.

    Raises:
        UserError: as `load_data`.
    """
    given: dict[str, Any] = {"data_format": data_format, "task": task, "columns": columns}
    train = load_data(data, **given)
    others, own, empty = _held_out(data if held_out is None else held_out, held_out is not None, given)
    alone = _left_alone(data, {"train", *((own, *empty) if held_out is None else ())})
    passed = (f"nothing to evaluate on in {listed(empty)}",) if empty else ()
    train = replace(train, notes=(*train.notes, *alone, *passed))
    if others is None:
        return _take_out(train, rows, seed)
    return train, disjoint(others, train).first(rows, seed)


def content_of(row: Mapping[str, Any]) -> str:
    """What makes two rows the same: all of their fields, blanks aside."""
    return " ".join(json.dumps(row, sort_keys=True, default=str).replace("\\n", " ").split())


def groups(rows: Sequence[Mapping[str, Any]], records: Sequence[Hashable]) -> list[list[int]]:
    """Indices of rows that belong on one side: of one record, or of records that share a row.

    Args:
        rows: as converted.
        records: what each of them was made from.

    >>> groups([{"text": "a"}, {"text": "b"}, {"text": "a"}], [1, 2, 3])
    [[0, 2], [1]]
    """
    first: dict[Hashable, int] = {}
    leader = list(range(len(rows)))
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        for key in (("record", record), ("row", content_of(row))):
            a, b = _leader(leader, first.setdefault(key, index)), _leader(leader, index)
            leader[max(a, b)] = min(a, b)
    together: dict[int, list[int]] = {}
    for index in range(len(rows)):
        together.setdefault(_leader(leader, index), []).append(index)
    return list(together.values())


def taken_out(found: Sequence[Sequence[int]], count: int, seed: int) -> set[int]:
    """About `count` indices of whole groups, chosen at random; never all groups, at least one.

    Args:
        found: two groups or more.
        count: how many rows are wanted; a group that is larger than what is missing is passed over.
        seed: of the choice.
    """
    order = random.Random(seed).sample(range(len(found)), len(found))
    chosen: set[int] = set()
    for place in order[1:]:
        if len(chosen) + len(found[place]) <= count:
            chosen.update(found[place])
    return chosen or {*sorted(found, key=lambda group: len(group))[0]}


def shared(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> set[int]:
    """Indices of rows that are among the others."""
    known = set(map(content_of, others))
    return {index for index, row in enumerate(rows) if content_of(row) in known}


def _leader(leader: list[int], index: int) -> int:
    """The first row of a group; the way there is shortened for the next who asks."""
    while leader[index] != index:
        leader[index] = leader[leader[index]]
        index = leader[index]
    return index


def _held_out(
    name_or_path: str, apart: bool, given: Mapping[str, Any]
) -> tuple[Data | None, str | None, list[str]]:
    """The rows to evaluate on, their split, and the splits passed over since they hold no rows.

    Args:
        name_or_path: the data.
        apart: whether all of it is held out: then files named after no split are meant, too.
        given: for `load_data`.

    Raises:
        NoRowsError: data of its own that holds none.
    """
    have, empty = splits(name_or_path), list[str]()
    own = [s for s in ("heldout", "validation", "test") if s in have]
    wanted: list[str] = [*own] or ["train"] * apart
    for split in wanted:
        try:
            return load_data(name_or_path, split=split, **given), split, empty
        except NoRowsError:
            if apart and split == wanted[-1]:
                raise
            empty.append(split)
    return None, None, empty


def _take_out(data: Data, rows: int, seed: int) -> tuple[Data, Data]:
    """Part a data set at random, without a row on both sides."""
    found = groups(data.rows, data.places)
    if len(found) < 2:
        note = "all rows are one and the same: the held-out loss is measured on what is trained"
        return data, replace(data.first(rows), split="held out", skipped=0, files=(), notes=(note,))
    wanted = min(rows, max(1, len(data.rows) // 10))
    chosen = taken_out(found, wanted, seed)
    train = data.only(i for i in range(len(data.rows)) if i not in chosen)
    held_out = data.only(sorted(chosen), split="held out", skipped=0, files=(), notes=())
    return train, held_out


def disjoint(held_out: Data, train: Data) -> Data:
    """Held-out rows without those that are trained on, or with a word about them."""
    both = shared(held_out.rows, train.rows)
    if not both:
        return held_out
    if len(both) == len(held_out.rows):
        note = "every row is also trained on: the held-out loss says nothing about new ones"
        return replace(held_out, notes=(*held_out.notes, note))
    note = f"{len(both)} rows that are also trained on are not evaluated"
    kept = (i for i in range(len(held_out.rows)) if i not in both)
    return held_out.only(kept, notes=(*held_out.notes, note))


def _left_alone(name_or_path: str, used: set[str | None]) -> tuple[str, ...]:
    """A note about the splits of a path that are neither trained nor evaluated on."""
    left = [
        f"{name} ({listed(files)})"
        for name, files in files_by_split(name_or_path).items()
        if name not in used
    ]
    return (f"left alone: {', '.join(left)}",) if left else ()
