"""Rows to train on and rows to evaluate on."""

from __future__ import annotations

import random
from dataclasses import replace

from lowmem.data.folders import listed
from lowmem.data.load import Data, files_by_split, load_data, splits
from lowmem.errors import UserError


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
    own = _held_out_split(data) if held_out is None else None
    train = replace(train, notes=(*train.notes, *_left_alone(data, {"train", own})))
    if held_out is not None:
        split = _held_out_split(held_out) or "train"
        return train, load_data(held_out, data_format=data_format, split=split).first(rows, seed)
    if own is not None:
        return train, load_data(data, data_format=data_format, split=own).first(rows, seed)
    return _take_out(train, rows, seed)


def _held_out_split(name_or_path: str) -> str | None:
    """The split to evaluate on, if the data has one."""
    return next((s for s in ("heldout", "validation", "test") if s in splits(name_or_path)), None)


def _take_out(data: Data, rows: int, seed: int) -> tuple[Data, Data]:
    """Part a data set at random, without overlap."""
    count = min(rows, max(1, len(data.rows) // 10))
    if len(data.rows) < 2:
        raise UserError(f"{data.name} has one row: give at least two, or held-out rows with --eval-data")
    chosen = set(random.Random(seed).sample(range(len(data.rows)), count))
    train = data.only(i for i in range(len(data.rows)) if i not in chosen)
    return train, data.only(sorted(chosen), split="held out", skipped=0, files=(), notes=())


def _left_alone(name_or_path: str, used: set[str | None]) -> tuple[str, ...]:
    """A note about the splits of a path that are neither trained nor evaluated on."""
    left = [
        f"{name} ({listed(files)})"
        for name, files in files_by_split(name_or_path).items()
        if name not in used
    ]
    return (f"left alone: {', '.join(left)}",) if left else ()
