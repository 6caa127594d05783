"""Messages in every naming become the one of chat templates; what is not understood is never trained on."""

import json

import pytest

from lowmem.data.load import load_data, to_prompt_completion
from lowmem.errors import UserError

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
FUNCTION = {"name": "weather", "arguments": {"city": "Nairobi"}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
JSON = '{"name": "weather", "arguments": {"city": "Nairobi"}}'


def one(*messages, **fields):
    (row,) = to_prompt_completion({"messages": list(messages), **fields})
    return row


def trained(row):
    """What is trained on, in the words of the answers."""
    return [m["content"] for m in row["completion"] if m["role"] == "assistant" and m.get("train", True)]


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("developer", "system"),
        ("system", "system"),
        ("human", "user"),
        ("User", "user"),
        ("observation", "tool"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("gpt", "assistant"),
    ],
)
@pytest.mark.parametrize("naming", [("role", "content"), ("from", "value")])
def test_roles_of_every_naming(given, role, naming):
    message = dict(zip(naming, (given, "words"), strict=True))
    assert one(message, ASK, SAY)["prompt"][0] == {"role": role, "content": "words"}


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}]
)
def test_answers_switched_off_are_context(off):
    bad, good = {"role": "assistant", "content": "5", **off}, {**SAY, "weight": 1, "train": True}
    row = one(ASK, bad, ASK, good, ASK, bad, ASK, SAY, ASK, bad)
    assert row["prompt"] == [ASK, {"role": "assistant", "content": "5"}, ASK]
    assert trained(row) == ["4", "4"]
    assert [m["content"] for m in row["completion"]] == ["4", "2+2?", "5", "2+2?", "4"]


def test_no_answer_left_is_no_row():
    assert to_prompt_completion({"messages": [ASK, {**SAY, "weight": 0}]}) == []


@pytest.mark.parametrize(
    "switch", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"weight": -1}, {"loss": [0]}]
)
def test_a_switch_that_is_not_understood_is_refused(switch):
    with pytest.raises(UserError, match=r"message 2 of 'messages' has .*: give 1 .* or 0"):
        one(ASK, {**SAY, **switch})


@pytest.mark.parametrize("name", ["train_detail", "loss_mask", "mask"])
def test_masks_within_a_message_are_refused(name):
    with pytest.raises(UserError, match=f"message 2 of 'messages' has '{name}', which is not understood"):
        one(ASK, {**SAY, name: [1]})


@pytest.mark.parametrize(
    "said",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "arguments": '{"city": "Nairobi"}'}}]},
        {"role": "assistant", "content": "", "tool_calls": [FUNCTION]},
        {"role": "assistant", "content": "", "tool_calls": f"[{JSON}]"},
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": FUNCTION},
        {"from": "function_call", "value": JSON},
        {"from": "function_call", "value": f"[{JSON}]"},
        {"from": "function_call", "value": FUNCTION},
        {"role": "assistant", "content": [{"type": "tool_call", "value": JSON}]},
        {"role": "tool_call", "content": JSON},
    ],
)
def test_calls_of_every_naming(said):
    row = one(ASK, said, {"from": "observation", "value": "18 C"}, {"from": "gpt", "value": "It is 18 C."})
    assert row["completion"] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "18 C"},
        {"role": "assistant", "content": "It is 18 C."},
    ]


def test_a_call_keeps_its_id_and_its_text():
    said = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": "c1", **CALL}]}
    heard = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"celsius": 18}}
    row = one(ASK, said, heard, SAY)
    assert row["completion"] == [said, {**heard, "content": '{"celsius": 18}'}, SAY]


@pytest.mark.parametrize("call", [{**CALL, "function": {**FUNCTION, "arguments": a}} for a in (None, "", {})])
def test_a_call_without_arguments(call):
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert one(ASK, said)["completion"][0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"tool_calls": [{**CALL, "function": {**FUNCTION, "arguments": "{city"}}]},
            "arguments of 'weather': it is no J",
        ),
        ({"tool_calls": [{**CALL, "function": {**FUNCTION, "arguments": "[1]"}}]}, "are list, not an object"),
        ({"tool_calls": [{"type": "function", "function": {"arguments": {}}}]}, "its function has no name"),
        ({"tool_calls": [{"type": "code_interpreter", "code": "1"}]}, "give type function"),
        ({"tool_calls": ["weather"]}, "give type function"),
        ({"role": "function_call", "content": "weather in Nairobi"}, "is not understood: it is no JSON"),
        ({"role": "function_call", "content": ""}, "has no tool call"),
        ({"role": "user", "tool_calls": [CALL]}, "only the assistant can"),
        ({"content": None}, "has no text"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content part of type 'image_url'"),
        ({"content": [{"type": "text"}]}, "content part of type 'text'"),
        ({"content": ["4"]}, "content part of type 'str'"),
        ({"role": "critic", "content": "4"}, "has the role 'critic'"),
    ],
)
def test_what_is_not_understood_is_refused(said, words):
    with pytest.raises(UserError, match=r"message 2 of 'messages' ") as caught:
        one(ASK, {"role": "assistant", **said})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?", "image_url": None}]
    row = one(
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
    )
    assert row == {"prompt": [ASK], "completion": [SAY]}


def test_content_parts_of_an_answer():
    parts = [("reasoning", "Look."), ("thinking", "Now."), ("text", "One moment."), ("tool_call", JSON)]
    said = {"role": "assistant", "content": [{"type": kind, "value": value} for kind, value in parts]}
    expected = {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}
    assert one(ASK, said)["completion"] == [{**expected, "reasoning_content": "Look.\nNow."}]
    for kind in ("reasoning", "tool_call"):
        with pytest.raises(UserError, match=f"content part of type '{kind}'"):
            one({"role": "user", "content": [{"type": kind, "value": JSON}]}, SAY)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_the_name_that_templates_read(name):
    assert one(ASK, {**SAY, name: "Two and two."})["completion"] == [
        {**SAY, "reasoning_content": "Two and two."}
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
        {"tools": '[{"name": "weather", "parameters": {"type": "object"}}]'},
    ],
)
def test_tools_of_every_naming(fields):
    assert one(ASK, SAY, **fields)["tools"] == [TOOL]
    assert to_prompt_completion({"prompt": [ASK], "completion": [SAY], **fields})[0]["tools"] == [TOOL]


def test_fields_that_another_row_gave_to_a_tool_are_dropped():
    given = {
        "type": "function",
        "function": {"name": "weather", "strict": None, "parameters": {"type": "object"}},
    }
    given["function"]["parameters"]["properties"] = {"city": {"enum": ["x", None]}, "date": None}
    schema = {"type": "object", "properties": {"city": {"enum": ["x", None]}}}
    (tool,) = one(ASK, SAY, tools=[given])["tools"]
    assert tool["function"] == {"name": "weather", "parameters": schema}


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_no_tools(tools):
    assert "tools" not in one(ASK, SAY, tools=tools)


@pytest.mark.parametrize("tools", ["weather", {"weather": 1}, ["weather"], [{"type": "function"}], 7])
def test_tools_that_are_not_understood(tools):
    with pytest.raises(
        UserError, match=r"field 'tools'(: it is no JSON| is not a list of tools, each with a name)"
    ):
        one(ASK, SAY, tools=tools)


def test_only_answers_of_a_completion_are_trained():
    row = {"prompt": [ASK, SAY, ASK], "completion": [SAY, ASK, {**SAY, "train": False}, ASK, SAY, ASK]}
    (converted,) = to_prompt_completion(row)
    assert converted["prompt"] == [ASK, SAY, ASK]
    assert converted["completion"] == [SAY, ASK, {**SAY, "train": False}, ASK, SAY]
    with pytest.raises(UserError, match="without an answer"):
        to_prompt_completion({"prompt": [ASK, SAY], "completion": [ASK]})


def test_unread_fields_of_messages_are_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(
        '[{"id": 1, "messages": [{"role": "user", "content": "Hi", "timestamp": 3, "weight": 1, "likes": []},'
        '{"role": "assistant", "content": "Hello", "weight": 1, "audio": null, "model": "x"}]}]'
    )
    assert load_data(str(file)).ignored == ("id", "messages.timestamp", "messages.weight", "messages.model")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "label: True"),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "keep the rows with good ones and take `label` out",
        ),
        ({"messages": [ASK, SAY], "label": "false"}, "label: 'false'"),
        ({"conversations": [ASK, SAY], "kto_tag": 0}, "kto_tag: 0"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "keep `prompt`, rename `chosen` to `completion` and",
        ),
        ({"prompt": "a", "chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "rename `chosen` to `messages`"),
        (
            {"conversations": [ASK, SAY, ASK], "chosen": SAY, "rejected": SAY},
            "append `chosen` to `conversations`",
        ),
        (
            {"messages": [ASK, SAY], "rejected_response": "5"},
            "keep the answer and take `rejected_response` out",
        ),
        ({"instruction": "a", "output": "b", "rejected": "c"}, "holds preferences (rejected)"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_preferences_and_judgements_are_refused_in_every_row(row, words, later, tmp_path):
    plain = {key: value for key, value in row.items() if "label" not in key and "kto" not in key}
    first = {key: value for key, value in plain.items() if "rejected" not in key and key != "chosen"}
    if later and len(first) == 1 and "prompt" in first:
        first["completion"] = "b"
    if later and "conversations" in first:
        first["conversations"] = [ASK, SAY]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ([first] if later else []) + [row]))
    with pytest.raises(UserError) as caught:
        load_data(str(file))
    assert words in str(caught.value)
    assert f"line {2 if later else 1}" in str(caught.value)


def test_a_label_that_judges_nothing_is_only_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"question": "Where?", "answer": "Here.", "label": "places"}\n{"question": "a", "answer": "b"}\n'
    )
    assert load_data(str(file)).ignored == ("label",)
