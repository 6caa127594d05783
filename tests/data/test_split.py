"""Nothing stands on both sides of the split, and where it must, it is said."""

import json

import pytest

from lowmem.data.split import content_of, groups, train_and_held_out
from lowmem.errors import UserError


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def contents(data):
    return {content_of(row) for row in data.rows}


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


@pytest.mark.parametrize("seed", range(5))
def test_a_conversation_is_on_one_side_as_a_whole(tmp_path, seed):
    rows = [chat(*(f"c{i} {who}{n}" for n in range(5) for who in "qa")) for i in range(30)]
    train, held = train_and_held_out(write(tmp_path / "c.jsonl", rows), seed=seed)
    sides = [{row["completion"][-1]["content"].split()[0] for row in side.rows} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 30
    assert 1 <= len(sides[1]) <= 3


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_are_on_one_side(tmp_path, seed):
    rows = [{"question": f"What is {i % 12} + 1?", "answer": f"{i % 12 + 1}"} for i in range(60)]
    train, held = train_and_held_out(write(tmp_path / "d.jsonl", rows), seed=seed)
    assert held.rows
    assert len(train.rows) + len(held.rows) == 60
    assert not contents(train) & contents(held)


def test_groups_are_joined_by_records_and_by_rows():
    rows = [{"text": text} for text in "abcadeb"]
    assert groups(rows, [0, 0, 1, 2, 2, 3, 4]) == [[0, 1, 3, 4, 6], [2], [5]]


def test_rows_on_both_sides_are_left_out_of_the_evaluation(tmp_path):
    train_file = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    other = write(tmp_path / "b.jsonl", [{"text": str(i)} for i in range(8, 14)])
    train, held = train_and_held_out(train_file, other)
    assert [row["text"] for row in held.rows] == ["10", "11", "12", "13"]
    assert "2 rows that are also trained on are not evaluated" in held.summary()
    assert len(train.rows) == 10


def test_the_same_data_on_both_sides_is_said(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    train, held = train_and_held_out(file, file)
    assert "every row is also trained on" in held.summary()
    assert (len(train.rows), len(held.rows)) == (10, 10)


@pytest.mark.parametrize("count", [1, 4])
def test_one_row_cannot_be_split_and_it_is_said(tmp_path, count):
    file = write(tmp_path / "a.jsonl", [{"text": "the same"}] * count)
    train, held = train_and_held_out(file)
    assert (len(train.rows), len(held.rows)) == (count, count)
    assert "the held-out loss is measured on what is trained" in held.summary()


def folder_of(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": str(i)} for i in range(20)])
    write(tmp_path / "test.jsonl", [])
    return tmp_path


def object_of(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"train": [{"text": str(i)} for i in range(20)], "test": []}))
    return file


def saved_of(tmp_path):
    from datasets import Dataset, DatasetDict

    train = Dataset.from_list([{"text": str(i)} for i in range(20)])
    DatasetDict(train=train, test=train.select([])).save_to_disk(tmp_path)
    return tmp_path


def unanswered_of(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": str(i)} for i in range(20)])
    write(tmp_path / "test.jsonl", [{"text": " "}])
    return tmp_path


@pytest.mark.parametrize("made", [folder_of, object_of, saved_of, unanswered_of])
def test_a_held_out_split_without_rows_is_passed_over_and_named(tmp_path, made):
    train, held = train_and_held_out(str(made(tmp_path)))
    assert (len(train.rows), len(held.rows), held.split) == (18, 2, "held out")
    assert train.summary().endswith("; nothing to evaluate on in test")


def test_the_next_held_out_split_is_taken_where_one_has_no_rows(tmp_path):
    write(folder_of(tmp_path) / "validation.jsonl", [])
    write(tmp_path / "test.jsonl", [{"text": "a"}])
    train, held = train_and_held_out(str(tmp_path))
    assert (len(train.rows), len(held.rows), held.split) == (20, 1, "test")
    assert train.notes == ("nothing to evaluate on in validation",)


@pytest.mark.parametrize("name", ["test.jsonl", ""])
def test_held_out_data_of_its_own_must_hold_rows(tmp_path, name):
    train = write(tmp_path / "a.jsonl", [{"text": "a"}])
    other = folder_of(tmp_path) / name
    with pytest.raises(UserError, match=r"nothing to (train|evaluate) on: it holds no rows"):
        train_and_held_out(train, str(other))
