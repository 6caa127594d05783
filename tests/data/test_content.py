"""An object as the content of a message is read as what it holds, and never learned as JSON."""

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
