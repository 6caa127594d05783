"""Rows that say which answer is better, and rows that only ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.data.load import load_data
from lowmem.data.split import train_and_held_out
from lowmem.errors import UserError

USER = [{"role": "user", "content": "2 + 2?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def loaded(folder: Path, task: str, *rows: dict[str, Any], **more: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_data(str(file), task=task, **more)


CHAT = {"prompt": USER, "chosen": said("4"), "rejected": said("5")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": said("4"), "rejected": said("5")},
        {"prompt": USER, "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 2?", "chosen": said("4"), "rejected": said("5")},
        {"prompt": "2 + 2?", "chosen": [*USER, *said("4")], "rejected": [*USER, *said("5")]},
        {"chosen": [*USER, *said("4")], "rejected": [*USER, *said("5")]},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"question": "2 + 2?", "chosen_response": "4", "rejected_response": "5"},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)
@pytest.mark.parametrize("task", ["dpo", "orpo", "reward"])
def test_the_ways_in_which_people_write_a_preference(row: dict[str, Any], task: str, tmp_path: Path) -> None:
    data = loaded(tmp_path, task, row)
    assert data.rows == (CHAT,)
    assert data.ignored == ()


def test_plain_texts_stay_texts(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    assert loaded(tmp_path, "dpo", row).rows == (row,)
    whole = {"chosen": "Human: 2 + 2? It is 4", "rejected": "Human: 2 + 2? It is 5"}
    parted = {"prompt": "Human: 2 + 2? It is ", "chosen": "4", "rejected": "5"}
    assert loaded(tmp_path, "dpo", whole).rows == (parted,)


def test_pairs_without_a_difference_teach_nothing(tmp_path: Path) -> None:
    data = loaded(tmp_path, "dpo", CHAT, {**CHAT, "chosen": said("5")}, {**CHAT, "chosen": said(" ")})
    assert (len(data.rows), data.skipped) == (1, 2)


def test_a_judgement_and_a_preference_as_two(tmp_path: Path) -> None:
    good = {"prompt": USER, "completion": said("4"), "label": True}
    for row in (
        {"prompt": USER, "completion": said("4"), "label": True},
        {"prompt": "2 + 2?", "completion": said("4"), "label": 1},
        {"messages": [*USER, *said("4")], "label": "true"},
        {"messages": [*USER, *said("4")], "kto_tag": True},
        {"question": "2 + 2?", "answer": "4", "label": True},
    ):
        (found,) = loaded(tmp_path, "kto", row).rows
        assert found == (good if isinstance(found["completion"], list) else {**good, "completion": "4"})
    assert loaded(tmp_path, "kto", CHAT).rows == (
        good,
        {"prompt": USER, "completion": said("5"), "label": False},
    )


def test_a_question_keeps_what_its_reward_needs(tmp_path: Path) -> None:
    assert loaded(tmp_path, "grpo", {"question": "2 + 2?", "answer": "4", "level": 1}).rows == (
        {"prompt": USER, "question": "2 + 2?", "answer": "4", "level": 1},
    )
    assert loaded(tmp_path, "grpo", {"prompt": "2 + 2 =", "answer": "4"}).rows[0]["prompt"] == "2 + 2 ="
    assert loaded(tmp_path, "grpo", {"messages": [*USER, *said("4")]}).rows == ({"prompt": USER},)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("dpo", {"question": "a", "answer": "b"}, "task dpo needs prompt, chosen, rejected"),
        (
            "dpo",
            {"prompt": "a", "chosen": "b", "rejected": said("c")},
            "one of 'chosen' and 'rejected' is text",
        ),
        ("dpo", {"chosen": "yes", "rejected": "no"}, "do not begin alike"),
        ("kto", {"prompt": "a", "completion": "b"}, "task kto needs"),
        ("kto", {"prompt": "a", "completion": "b", "label": "maybe"}, "neither true nor false"),
        ("kto", {"messages": USER, "label": True}, "messages that end with an answer"),
        ("grpo", {"text": "a"}, "task grpo needs"),
    ],
)
def test_other_rows_are_refused_with_their_place(
    task: str, row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        loaded(tmp_path, task, row)
    assert "rows.jsonl" in str(caught.value)


def test_the_better_answer_is_the_answer_where_the_caller_says_so(tmp_path: Path) -> None:
    """A set of preferences serves supervised fine-tuning; what is passed over is named."""
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(UserError, match="--columns completion=chosen"):
        loaded(tmp_path, "sft", row)
    data = loaded(tmp_path, "sft", row, columns={"completion": "chosen"})
    assert data.ignored == ("rejected",)
    assert data.rows == ({"prompt": "p", "completion": "c"},)


def test_columns_are_named_by_the_caller(tmp_path: Path) -> None:
    row = {"frage": "2 + 2?", "gut": "4", "schlecht": "5", "prompt": "old"}
    named = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    data = loaded(tmp_path, "dpo", row, columns=named)
    assert data.rows == ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},)
    assert "read frage as prompt, gut as chosen, schlecht as rejected" in data.summary()
    answer = loaded(tmp_path, "sft", {"f": "2 + 2?", "a": "4"}, columns={"question": "f", "answer": "a"})
    assert answer.rows == ({"prompt": USER, "completion": said("4")},)
    with pytest.raises(UserError, match=r"no column 'fragen'.*did you mean 'frage'"):
        loaded(tmp_path, "dpo", row, columns={**named, "prompt": "fragen"})


def test_preferences_are_parted_like_other_rows(tmp_path: Path) -> None:
    rows = [{**CHAT, "chosen": said(str(i))} for i in range(20, 40)]
    loaded(tmp_path, "dpo", *rows)
    train, held_out = train_and_held_out(str(tmp_path / "rows.jsonl"), task="dpo", rows=2)
    assert (len(train.rows), len(held_out.rows)) == (18, 2)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classify", "--columns candidates=choices,label=right"),
        ("kto", "--columns completion=answer,label=good"),
        ("grpo", "--columns prompt=task"),
        ("dpo", "--columns chosen=better,rejected=worse"),
    ],
)
def test_names_that_are_advised_are_those_of_the_task(task: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, task, {"text": "a"})
    assert str(caught.value).endswith(words)


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_messages_and_lists_in_the_cells_of_a_table(written: Any, tmp_path: Path) -> None:
    import pandas

    def read(task: str, **cells: Any) -> dict[str, Any]:
        texts = {key: value if isinstance(value, str) else written(value) for key, value in cells.items()}
        pandas.DataFrame([texts]).to_csv(tmp_path / "a.csv", index=False)
        (row,) = load_data(str(tmp_path / "a.csv"), task=task).rows
        return row

    pair = {"prompt": USER, "chosen": said("4"), "rejected": said("5")}
    assert read("dpo", **pair) == pair
    choice = {"prompt": "2 + 2?", "candidates": ["4", "five"], "label": 1}
    assert read("classify", **choice) == choice
    assert read("classify", **{**choice, "label": "4"}) == {**choice, "label": 0}
    with pytest.raises(UserError, match=r"field 'candidates' is '\[sic\]', not a list"):
        read("classify", **{**choice, "candidates": "[sic]"})
