"""Rows to train on and rows to evaluate on."""

import json

import pytest

from lowmem.data.split import train_and_held_out
from lowmem.errors import UserError


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_held_out_rows_are_taken_out(tmp_path):
    rows = [{"text": str(i)} for i in range(50)]
    file = write(tmp_path / "rows.jsonl", rows)
    train, held = train_and_held_out(file, rows=80)
    names = [row["text"] for row in train.rows + held.rows]
    assert (len(train.rows), len(held.rows)) == (45, 5)
    assert sorted(names, key=int) == [row["text"] for row in rows]
    assert train_and_held_out(file, rows=80) == (train, held)
    assert train_and_held_out(file, rows=80, seed=1)[1] != held
    assert len(train_and_held_out(file, rows=3)[1].rows) == 3


def test_held_out_rows_of_their_own(tmp_path):
    rows = [{"text": str(i)} for i in range(7)]
    train, held = train_and_held_out(
        write(tmp_path / "a.jsonl", rows[:5]), write(tmp_path / "b.jsonl", rows[5:])
    )
    assert (len(train.rows), len(held.rows)) == (5, 2)
    train, held = train_and_held_out("factbook", rows=80)
    assert (len(train.rows), len(held.rows), held.split) == (1558, 80, "heldout")


def test_one_row_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="has one row"):
        train_and_held_out(write(tmp_path / "a.jsonl", [{"text": "one"}]))
