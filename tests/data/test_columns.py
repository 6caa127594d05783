"""Columns as people name them; tables and JSON as programs write them."""

import itertools
import json

import pytest

from lowmem.data.load import load_data, to_prompt_completion
from lowmem.data.rows.columns import understood
from lowmem.errors import UserError

ASK = {"role": "user", "content": "Where is Kenya?"}
SAY = {"role": "assistant", "content": "In Africa."}
CHAT = [{"prompt": [ASK], "completion": [SAY]}]


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "response"),
        ("query", "response"),
        ("input", "output"),
        ("inputs", "targets"),
        ("problem", "solution"),
        ("question", "response"),
        ("instruction", "answer"),
        ("user", "assistant"),
        ("Question", "Answer"),
        (" QUESTION ", "Answer "),
        ("Prompt", "RESPONSE"),
    ],
)
def test_names_of_question_and_answer(names):
    row = dict(zip(names, ("Where is Kenya?", "In Africa."), strict=True))
    assert to_prompt_completion({**row, "ID": 7}) == CHAT


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["In Africa.", "Africa"], "answer_start": [3, 6]},
        ["In Africa."],
        {"value": "In Africa.", "aliases": ["Africa"]},
        "In Africa.",
    ],
)
def test_answers_of_which_the_first_is_the_one(answers):
    row = {"id": "1", "title": "t", "question": "Where is Kenya?", "answers": answers}
    assert to_prompt_completion(row) == CHAT
    assert to_prompt_completion({**row, "context": "A map."})[0]["prompt"][0]["content"].startswith("A map.")
    assert to_prompt_completion({**row, "answers": {"text": [], "answer_start": []}}) == []


def test_what_was_asked_is_not_what_a_better_pair_asks():
    row = {"problem": "Where is Kenya?", "solution": "In Africa.", "answer": "Africa"}
    turned = dict(reversed(row.items()))
    assert to_prompt_completion(row) == to_prompt_completion(turned) == CHAT  # wherever its column stands
    assert understood(row).left == understood(turned).left == ("answer",)
    alpaca = {"instruction": "Translate.", "input": "Bonjour", "response": "Hello"}
    assert understood(alpaca).row == alpaca
    asked = {"instruction": "Translate.", "input": "Bonjour", "answer": "Hello"}
    assert to_prompt_completion(asked)[0]["prompt"][0]["content"] == "Translate.\n\nBonjour"


def test_a_format_that_is_given_decides_what_they_are():
    row = {"prompt": "Where?", "response": "Here."}
    assert to_prompt_completion(row, "prompt_completion") == [{"prompt": "Where?", "completion": "Here."}]
    assert to_prompt_completion(row, "alpaca")[0]["completion"][0]["content"] == "Here."
    with pytest.raises(UserError, match="no field 'text'"):
        to_prompt_completion(row, "text")


@pytest.mark.parametrize(
    "talk",
    [
        [ASK, SAY],
        json.dumps([ASK, SAY]),
        {"role": ["user", "assistant"], "content": ["Where is Kenya?", "In Africa."]},
        {"from": ["human", "gpt"], "value": ["Where is Kenya?", "In Africa."]},
    ],
)
@pytest.mark.parametrize("name", ["messages", "Messages", "conversations", "conversation", "dialog", "chat"])
def test_messages_in_their_wrappings(name, talk):
    assert to_prompt_completion({name: talk, "id": 3}) == CHAT


def test_a_prompt_of_messages_and_an_answer_that_is_text():
    assert to_prompt_completion({"prompt": [ASK], "response": "In Africa."}) == CHAT


def test_a_system_prompt_leads():
    row = {"system_prompt": "Be short.", "question": "Where is Kenya?", "response": "In Africa."}
    assert to_prompt_completion(row)[0]["prompt"][0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"article": "a", "highlights": "b"}, "article, highlights, which fit no format: rename columns"),
        ({"prompt": "a"}, "fit no format"),
        ({f"column{i}" * 9: 1 for i in range(40)}, "and 32 more, which fit no format"),
        ({"messages": '[{"role": '}, "field 'messages' is text, and no JSON"),
        (
            {"Prompt": "a", "Response": 7},
            r"\(question_answer, read Prompt as question, .*field 'answer' is int, not text",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
    ],
)
def test_what_is_not_understood_is_refused(row, words):
    with pytest.raises(UserError, match=words) as caught:
        to_prompt_completion(row)
    assert "\n" not in str(caught.value)


def load(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_data(str(tmp_path / name))


def test_other_names_are_said_and_unused_columns_keep_theirs(tmp_path):
    data = load(tmp_path, "a.csv", "Prompt,Response,Source\nWhere?,Here.,web\n")
    assert data.summary().endswith("ignored fields: Source; read Prompt as question, Response as answer")
    several = json.dumps({"question": "a", "answers": ["b", "c"]})
    assert load(tmp_path, "b.jsonl", several).ignored == ("all answers but the first",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "\ufeffquestion;answer\nOne, or two?;4\nThree?;6\n"),
        ("a.csv", "question\tanswer\nOne, or two?\t4\nThree?\t6\n"),
        ("a.csv", "sep=;\nquestion;answer\nOne, or two?;4\nThree?;6\n"),
        ("a.csv", '"question";"answer"\n"One, or two?";4\n"Three?";6\n'),
        ("a.tsv", 'question,answer\n"One, or two?",4\nThree?,6\n'),
        ("a.csv", "Question|Answer\rOne, or two?|4\rThree?|6\r"),
    ],
)
def test_separators(tmp_path, name, text):
    data = load(tmp_path, name, text)
    assert [row["completion"][0]["content"] for row in data.rows] == ["4", "6"]
    assert data.rows[0]["prompt"][0]["content"] == "One, or two?"


def test_a_long_record_names_its_separator(tmp_path):
    with pytest.raises(UserError, match=r"line 2 has 3 fields, .* that holds a semicolon"):
        load(tmp_path, "a.csv", "question;answer\na;b;c\n")


def test_utf16_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "a.csv").write_bytes("question\tanswer\nWo?\tBei Köln\n".encode("utf-16"))
    assert load_data(str(tmp_path / "a.csv")).rows[0]["completion"][0]["content"] == "Bei Köln"


ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "\n".join(json.dumps([row]) for row in ROWS),
        "\n".join(
            json.dumps(
                [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
            )
            for r in ROWS
        ),
    ],
)
def test_lists_in_lines(tmp_path, text):
    data = load(tmp_path, "a.jsonl", text)
    assert [row["completion"][0]["content"] for row in data.rows] == ["b", "d"]
    assert len(set(data.places)) == 2


@pytest.mark.parametrize(
    "value",
    [
        {"rows": ROWS, "version": "1"},
        {"examples": ROWS},
        {"question": ["a", "c"], "answer": ["b", "d"]},
        {"train": {"question": ["a", "c"], "answer": ["b", "d"]}},
        {"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)], "features": []},
    ],
)
def test_wrappings_of_a_document(tmp_path, value):
    data = load(tmp_path, "a.json", json.dumps(value))
    assert [row["completion"][0]["content"] for row in data.rows] == ["b", "d"]


def test_parquet_with_messages_as_programs_write_them(tmp_path):
    import pandas

    rows = [
        {"messages": {"role": ["user", "assistant"], "content": ["Where is Kenya?", "In Africa."]}},
        {"messages": {"role": ["user", "assistant"], "content": ["Where is Peru?", "In America."]}},
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    texts = [{"messages": json.dumps([ASK, SAY])}]
    pandas.DataFrame(texts).to_parquet(tmp_path / "b.parquet")
    assert len(load_data(str(tmp_path / "a.parquet")).rows) == 2
    assert list(load_data(str(tmp_path / "b.parquet")).rows) == CHAT


SIDES = {
    "prompt": [
        "Where is Kenya?",
        [ASK],
        ASK,
        json.dumps([ASK]),
        {"role": ["user"], "content": [ASK["content"]]},
    ],
    "answer": ["In Africa.", [SAY], SAY, json.dumps([SAY])],
}


@pytest.mark.parametrize("names", [("prompt", "response"), ("prompt", "completion"), ("question", "answer")])
@pytest.mark.parametrize(("asked", "said"), list(itertools.product(*SIDES.values()))[1:])
def test_a_side_is_text_or_messages_in_every_row(tmp_path, names, asked, said):
    first = dict(zip(names, ([ASK], "In Africa."), strict=True))
    row = dict(zip(names, (asked, said), strict=True))
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n{json.dumps(row)}\n")
    data = load_data(str(file))
    assert list(data.rows) == CHAT * 3
    assert data.ignored == ()
    if names == ("prompt", "response") and asked == [ASK]:
        assert data.notes == ("read response as completion",)


def test_a_side_beside_messages_must_say_something(tmp_path):
    assert to_prompt_completion({"prompt": [ASK], "response": " "}) == []
    with pytest.raises(UserError, match="field 'prompt' is empty"):
        to_prompt_completion({"prompt": " ", "completion": [SAY]})
    with pytest.raises(UserError, match="field 'completion' is null"):
        to_prompt_completion({"prompt": [ASK], "completion": None}, "prompt_completion")


OTHER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "given",
    [
        [[ASK, SAY], OTHER],
        {"data": [[ASK, SAY], OTHER]},
        {"messages": [[ASK, SAY], OTHER]},
        {"messages": [[ASK, SAY], OTHER], "test": [1, 2]},
        {"id": [1, 2], "messages": [[ASK, SAY], OTHER]},
        {"messages": {"0": [ASK, SAY], "1": OTHER}, "test": {"0": "x", "1": "y"}},
        {"prompt": ["Where is Kenya?", "a"], "response": ["In Africa.", "b"], "test": ["x", "y"]},
        {"id": [1, 2], "question": ["Where is Kenya?", "a"], "answer": ["In Africa.", "b"]},
        {"question": {"0": "Where is Kenya?", "1": "a"}, "answer": {"0": "In Africa.", "1": "b"}},
        {"0": {"question": "Where is Kenya?", "answer": "In Africa."}, "7": {"question": "a", "answer": "b"}},
        {"train": {"1": {"messages": [ASK, SAY]}, "2": {"messages": OTHER}}, "test": []},
        {"train": [[ASK, SAY], OTHER], "test": [OTHER, OTHER]},
    ],
)
def test_wrappings_of_a_whole_document(tmp_path, given):
    data = load(tmp_path, "a.json", json.dumps(given, indent=1))
    assert list(data.rows) == [*CHAT, {"prompt": OTHER[:1], "completion": OTHER[1:]}]


@pytest.mark.parametrize(
    "given", [[ASK, SAY], {"messages": [ASK, SAY]}, {"prompt": [ASK], "completion": [SAY]}]
)
def test_a_document_of_one_row(tmp_path, given):
    assert list(load(tmp_path, "a.json", json.dumps(given)).rows) == CHAT


def test_messages_as_pandas_writes_them_into_a_table(tmp_path):
    import pandas

    pandas.DataFrame({"messages": [[ASK, {**SAY, "content": 'It\'s in "Africa".', "x": None}]]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    assert load_data(str(tmp_path / "a.csv")).rows[0]["completion"][0]["content"] == 'It\'s in "Africa".'
    with pytest.raises(
        UserError, match=r"field 'messages' is text, and no JSON: .*; write it with json.dumps"
    ):
        load(tmp_path, "b.csv", "messages\n[print(1)]\n")


@pytest.mark.parametrize(
    ("answer", "words"), [(4, r'is int, not .*\("4"\)'), (True, r'is bool, .*\("True"\)')]
)
def test_an_answer_that_is_no_text_is_refused_with_a_remedy(answer, words):
    with pytest.raises(UserError, match=f"field 'answer' {words}"):
        to_prompt_completion({"question": "2+2?", "answer": answer})


def test_texts_instead_of_rows_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r'row 1 is str, not an object with named fields: give \{"text"'):
        load(tmp_path, "a.json", '["a", "b"]')
