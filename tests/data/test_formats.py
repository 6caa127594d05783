"""Rows of six shapes become prompt and completion; a bad row says what is wrong with it."""

import pytest

from lowmem.data.load import to_prompt_completion
from lowmem.data.rows.formats import detect_format, formats, named
from lowmem.errors import UserError

ASK = {"role": "user", "content": "Where is Kenya?"}
SAY = {"role": "assistant", "content": "In Africa."}
SHORT = {"role": "system", "content": "Be short."}
CHAT = [{"prompt": [ASK], "completion": [SAY]}]


@pytest.mark.parametrize(
    ("row", "name", "converted"),
    [
        ({"text": "Kenya."}, "text", [{"text": "Kenya."}]),
        (
            {"prompt": "Kenya is", "completion": " in Africa."},
            "prompt_completion",
            [{"prompt": "Kenya is", "completion": " in Africa."}],
        ),
        ({"prompt": [ASK], "completion": [SAY]}, "prompt_completion", CHAT),
        ({"messages": [ASK, SAY]}, "messages", CHAT),
        ({"conversations": [ASK, SAY]}, "sharegpt", CHAT),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Where is Kenya?"},
                    {"from": "gpt", "value": "In Africa."},
                ]
            },
            "sharegpt",
            CHAT,
        ),
        ({"instruction": "Where is Kenya?", "output": "In Africa."}, "alpaca", CHAT),
        ({"instruction": "Where is Kenya?", "input": "", "output": "In Africa."}, "alpaca", CHAT),
        ({"instruction": "Where is Kenya?", "context": None, "response": "In Africa."}, "alpaca", CHAT),
        ({"question": "Where is Kenya?", "answer": "In Africa.", "id": 7}, "question_answer", CHAT),
    ],
)
def test_recognised_and_converted(row, name, converted):
    assert detect_format(row).name == name
    assert to_prompt_completion(row) == converted
    assert to_prompt_completion(row, name) == converted


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Translate.", "input": "Bonjour", "output": "Hello", "text": "the same, rendered"}
    assert to_prompt_completion(row)[0]["prompt"][0]["content"] == "Translate.\n\nBonjour"


def test_a_passage_comes_before_the_question():
    row = {"context": "Kenya: in Africa.", "question": "Where is Kenya?", "answer": "In Africa."}
    assert to_prompt_completion(row)[0]["prompt"][0]["content"] == "Kenya: in Africa.\n\nWhere is Kenya?"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [ASK, SAY]},
        {"messages": [ASK, SAY]},
        {"messages": [SHORT, ASK, SAY]},
        {"prompt": [ASK], "completion": [SAY]},
        {"instruction": "Where is Kenya?", "output": "In Africa."},
        {"question": "Where is Kenya?", "answer": "In Africa."},
    ],
)
def test_a_system_field_leads_the_conversation(row):
    (converted,) = to_prompt_completion({**row, "system": "Be short."})
    assert converted == {"prompt": [SHORT, ASK], "completion": [SAY]}


def test_each_answer_of_a_conversation_is_trained_on_once():
    more = {"role": "user", "content": "And Peru?"}
    other = {"role": "assistant", "content": "In America."}
    rows = to_prompt_completion({"messages": [SHORT, ASK, SAY, more, other, ASK]})
    assert rows == [{"prompt": [SHORT, ASK], "completion": [SAY, more, other]}]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "  \n"},
        {"prompt": "Kenya is", "completion": " "},
        {"question": "Where is Kenya?", "answer": ""},
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        {"prompt": [ASK], "completion": [{"role": "assistant", "content": ""}]},
    ],
)
def test_an_empty_answer_is_no_row(row):
    assert to_prompt_completion(row) == []


@pytest.mark.parametrize(
    ("row", "data_format", "words"),
    [
        ({"question": "Where?"}, "question_answer", "no field 'answer' .it has question"),
        ({"question": "Where?", "answer": None}, "question_answer", "field 'answer' is null: fill it in"),
        ({"instruction": "x", "response": None}, "alpaca", "field 'response' is null"),
        ({"instruction": "x", "response": 7}, "alpaca", "field 'response' is int, not text"),
        ({"question": "Where?", "answer": 7}, "question_answer", "'answer' is int, not text"),
        ({"question": " ", "answer": "Here."}, "question_answer", "the question is empty"),
        ({"instruction": "Do it."}, "alpaca", "no field 'output'"),
        ({"prompt": "Kenya is"}, "prompt_completion", "no field 'completion'"),
        ({"body": "x"}, "text", "no field 'text'"),
        ({"messages": "hello"}, "messages", "not a list of messages"),
        ({"messages": []}, "messages", "not a list of messages"),
        ({"messages": [ASK]}, "messages", "without an answer"),
        ({"messages": ["hello"]}, "messages", "message 1 of 'messages' is str"),
        ({"messages": [ASK, {"role": "assistant"}]}, "messages", "message 2 of 'messages' has no text"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages", "role 'usr': did you mean 'user'"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages",
            r"row 1 .*the role \['user'\]: did you",
        ),
        ({"conversations": None}, "sharegpt", "field 'conversations' is null"),
        (
            {"system": "Be long.", "messages": [{"role": "system", "content": "Be short."}, ASK, SAY]},
            "messages",
            "two system messages, field 'system' and the first of 'messages': keep one of them",
        ),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, data_format, words):
    with pytest.raises(UserError, match=words) as caught:
        to_prompt_completion(row, data_format)
    assert "\n" not in str(caught.value)


def test_unknown_fields_list_the_formats():
    with pytest.raises(UserError) as caught:
        detect_format({"body": "x", "title": "y"})
    assert all(name in str(caught.value) for name in ["body, title", *formats()])


def test_a_first_row_with_a_null_names_the_field():
    with pytest.raises(UserError, match=r"^a.jsonl, line 1 \(question_answer\): field 'answer' is null"):
        detect_format({"question": "Where?", "answer": None}, "a.jsonl, line 1")
    assert detect_format({"messages": None, "text": "x"}).name == "text"


def test_preferences_name_the_remedy():
    with pytest.raises(UserError, match="rename `chosen` to `completion`"):
        detect_format({"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize("name", ["question_answer", "Question/Answer", "question-answer"])
def test_spellings_of_a_name(name):
    assert named(name).name == "question_answer"


def test_unknown_name_has_the_nearest():
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        named("alpacca")
