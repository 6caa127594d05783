"""What of a row and a message is learned: an object is what it holds, and weight 0 is not learned."""

import json

import pytest

from lowmem.data.load import load_data, to_prompt_completion
from lowmem.errors import UserError

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
OBJECTS = [
    {"type": "text", "text": "4"},
    {"text": "4"},
    {"text": "4", "type": None, "image_url": None},
    {"type": "output_text", "value": "4"},
    {"content_type": "text", "parts": ["4"]},
    {"content_type": "text", "parts": [{"content_type": "text", "text": "4"}]},
]


@pytest.mark.parametrize("said", OBJECTS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_an_object_that_holds_a_text_is_that_text(role, said):
    messages = {"system": {"role": "system", "content": "Add."}, "user": ASK, "assistant": SAY}
    given = [{**m, "content": said} if m["role"] == role else m for m in messages.values()]
    (row,) = to_prompt_completion({"messages": given})
    whole = [*row["prompt"], *row["completion"]]
    assert whole == [{**m, "content": "4"} if m["role"] == role else m for m in messages.values()]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"answer": "4"}, "has an object as content, of 'answer': give a text, or {"),
        ({}, "has an object as content, of nothing: give a text, or {"),
        ({"type": "text"}, "has an object as content, of 'type'"),
        ({"content_type": "code", "text": "4"}, "content part of type 'code'"),
        ({"content_type": "multimodal_text", "parts": ["4"]}, "content part of type 'multimodal_text'"),
        (
            {"content_type": "text", "parts": [{"content_type": "image_asset_pointer"}]},
            "content part of type 'image_asset_pointer'",
        ),
        (4, "has the content 4 (int), not text: put it in quotes"),
        (False, "has the content False (bool), not text: put it in quotes"),
    ],
)
def test_an_object_without_a_text_is_refused_of_everybody(role, said, words):
    with pytest.raises(UserError) as caught:
        to_prompt_completion({"messages": [{"role": role, "content": said}, ASK, SAY]})
    assert words in str(caught.value)


def test_what_a_tool_returns_is_its_json():
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]}
    heard = {"role": "tool", "content": {"type": "text", "sum": 4}}
    (row,) = to_prompt_completion({"messages": [ASK, call, heard, SAY]})
    assert row["completion"][1]["content"] == '{"type": "text", "sum": 4}'


def test_what_else_a_part_holds_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": "b"}]},'
        ' {"role": "assistant", "content": {"text": "b", "annotations": [], "score": 1}}]}'
    )
    assert load_data(str(file)).ignored == ("messages.content.cache_control", "messages.content.score")


def load(tmp_path, *rows, name="rows.jsonl", **given):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(str(tmp_path / name), **given)


QUESTION = {"question": "2+2?", "answer": "4"}


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_weight": 0}])
@pytest.mark.parametrize("row", [QUESTION, {"messages": [ASK, SAY]}, {"prompt": "2+2", "completion": "4"}])
def test_a_row_of_weight_0_is_left_out_and_named(tmp_path, row, off):
    on = dict.fromkeys(off, 1)
    data = load(tmp_path, {**row, **off}, {**row, **on}, {**row, **off, "messages": None})
    assert (len(data.rows), data.skipped, data.ignored) == (1, 0, ())
    assert data.notes == ("2 of weight 0 left out",)
    assert to_prompt_completion({**row, **off}) == []
    with pytest.raises(UserError, match="nothing to train on: 1 rows of weight 0"):
        load(tmp_path, {**row, **off})


def test_a_row_of_weight_0_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,weight\n2+2?,5,0\n2+2?,4,1.0\n")
    (row,) = load_data(str(tmp_path / "a.csv")).rows
    assert row["completion"] == [SAY]


def test_rows_of_weight_0_of_other_tasks(tmp_path):
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert len(load(tmp_path, pair, {**pair, "weight": 0}, task="dpo").rows) == 1
    asked = load(tmp_path, {"prompt": "2+2?", "weight": 0}, task="grpo")  # the reward's own business
    assert asked.rows == ({"prompt": "2+2?", "weight": 0},)


def test_numbers_that_leave_no_row_out_are_named(tmp_path):
    assert load(tmp_path, {**QUESTION, "weight": 0.5, "loss": 0}).ignored == ("weight", "loss")


def test_a_turn_that_is_not_trained_on_is_context(tmp_path):
    off = {**SAY, "content": "5", "train_on_turn": False}
    data = load(tmp_path, {"messages": [ASK, off, ASK, {**SAY, "train_on_turn": True}]})
    assert data.rows == ({"prompt": [ASK, {**SAY, "content": "5"}, ASK], "completion": [SAY]},)
    assert data.ignored == ()


def test_an_answer_that_opens_a_conversation_is_named(tmp_path):
    hello = {"role": "assistant", "content": "Hello"}
    data = load(tmp_path, {"messages": [hello, ASK, SAY]}, {"messages": [hello, ASK]})
    assert data.rows == ({"prompt": [hello, ASK], "completion": [SAY]},)
    assert data.ignored == ("an answer that opens a conversation",)
    assert data.notes == ("1 with no answer but the one that opens them left out",)
    assert load(tmp_path, {"messages": [{**hello, "weight": 0}, ASK, SAY]}).ignored == ()


def test_rows_whose_answers_have_weight_0_are_called_so(tmp_path):
    off = {"messages": [ASK, {**SAY, "weight": 0}]}
    with pytest.raises(
        UserError, match="nothing to train on: 1 rows whose answers have weight 0; 1 rows are empty"
    ):
        load(tmp_path, off, {"messages": [ASK, {**SAY, "content": " "}]})
    data = load(tmp_path, off, {"messages": [ASK, SAY]}, {"messages": [ASK, {**SAY, "content": ""}]})
    assert (data.skipped, data.notes) == (1, ("1 whose answers have weight 0 left out",))


def test_columns_that_are_not_read_have_no_other_name(tmp_path):
    (tmp_path / "a.csv").write_text(",Question,Answer,My Notes\n0,2+2?,4,\n1,2+2?,4,x\n")
    data = load_data(str(tmp_path / "a.csv"))
    assert data.ignored == ("Unnamed: 0", "My Notes")
    assert data.notes == ()
