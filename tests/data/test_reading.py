"""Files of every kind become the same rows; damage is named with its place."""

import json

import pytest

from lowmem.data.files.readers import SECTION
from lowmem.data.load import load_data, load_rows
from lowmem.errors import UserError
from lowmem.models import hub

ROWS = [{"question": f"What is {i}, or “{i}”?", "answer": f"A number,\nnamely {i}."} for i in range(5)]


def write(folder, name, rows=ROWS):
    """The same rows in the format that the suffix names."""
    import pandas

    file = folder / name
    kind = file.suffix
    if kind in (".jsonl", ".ndjson"):
        file.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n", encoding="utf-8")
    elif kind == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".parquet":
        pandas.DataFrame(rows).to_parquet(file)
    else:
        pandas.DataFrame(rows).to_csv(file, index=False, sep="\t" if kind == ".tsv" else ",")
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, suffix):
    data = load_data(str(write(tmp_path, f"rows.{suffix}")))
    assert (data.format, data.recognised, data.skipped) == ("question_answer", True, 0)
    assert [r["completion"][0]["content"] for r in data.rows] == [r["answer"] for r in ROWS]
    assert [r["prompt"][0]["content"] for r in data.rows] == [r["question"] for r in ROWS]


def test_json_in_other_wrappings(tmp_path):
    file = tmp_path / "rows.json"
    for text in (json.dumps({"data": ROWS}), "\n".join(map(json.dumps, ROWS))):
        file.write_text(text)
        assert len(load_data(str(file)).rows) == 5


@pytest.mark.parametrize(
    "ids", [("q-1", "q-2", "q-3"), ("train-1", "test-2", "x3"), ("alpha", "beta", "gamma")]
)
def test_rows_under_ids(tmp_path, ids):
    """Also where an id sounds like a split."""
    file = tmp_path / "rows.json"
    for rows in (ROWS, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3):
        file.write_text(json.dumps(dict(zip(ids, rows, strict=False))))
        assert len(load_data(str(file)).rows) == 3


def test_two_named_parts_of_one_row_are_no_rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"question": {"text": "Where?"}, "answer": {"text": "Here."}}))
    with pytest.raises(UserError, match="question"):
        load_data(str(file))


@pytest.mark.parametrize("name", ["rows.json", "train.json"])
@pytest.mark.parametrize("rows", [{"train": ROWS, "test": ROWS[:1]}, {"data": ROWS}])
@pytest.mark.parametrize("info", [{"version": 1}, "made by hand", 2, ["a", "b"]])
def test_what_stands_beside_rows_is_named(tmp_path, name, rows, info):
    if name == "train.json" and "train" in rows:
        rows = {"rows": ROWS}
    (tmp_path / name).write_text(json.dumps({"info": info, **rows, "n": None}))
    data = load_data(str(tmp_path))
    assert len(data.rows) == 5
    assert f"not read: {name}: info, {name}: n" in data.summary()
    if "test" in rows:
        assert len(load_data(str(tmp_path), split="test").rows) == 1


def test_byte_order_mark_and_long_cells(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("\ufefftext\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(load_data(str(file)).rows[0]["text"]) == 200_000


def test_cells_stay_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nHow many?,007\nNothing?,NA\n")
    assert [r["completion"][0]["content"] for r in load_data(str(file)).rows] == ["007", "NA"]


def test_a_separator_at_the_end_of_each_record_loses_nothing(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\na,b,\nc,d,\n")
    assert [r["completion"][0]["content"] for r in load_data(str(file)).rows] == ["b", "d"]


def test_fields_that_are_not_used_are_named(tmp_path):
    rows = [
        {"question": "a", "answer": "b", "id": 1, "note": None, "tags": []},
        {"question": "a", "answer": "b", "id": 2, "context": {"title": "x"}, "system": "Be short."},
    ]
    data = load_data(str(write(tmp_path, "rows.jsonl", rows)))
    assert data.ignored == ("id", "context")
    assert data.summary().endswith("; ignored fields: id, context")
    history = [{"instruction": "a", "input": "b", "context": "c", "output": "d", "history": [["e", "f"]]}]
    assert load_data(str(write(tmp_path, "h.jsonl", history))).ignored == ("context", "history")
    pair = [{"prompt": "a", "completion": "b", "system": "c"}]  # texts: no place for a system message
    assert load_data(str(write(tmp_path, "p.jsonl", pair))).ignored == ("system",)
    assert "ignored" not in load_data(str(write(tmp_path, "q.jsonl"))).summary()


def test_text_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}: " + "word " * (i * 40) for i in range(30)] + ["y" * (2 * SECTION + 5)]
    file = tmp_path / "book.md"
    file.write_text("\n\n".join(paragraphs))
    data = load_data(str(file))
    assert (data.format, data.packing_strategy) == ("text", "wrapped")
    texts = [row["text"] for row in data.rows]
    assert len(texts) > 10
    assert max(map(len, texts)) <= SECTION + 2 * 30
    squeezed = "".join(" ".join(paragraphs).split())
    assert "".join("".join(texts).split()) == squeezed
    assert texts[0].startswith("Paragraph 0:\n\nParagraph 1: word")


def test_empty_answers_are_counted(tmp_path):
    file = write(tmp_path, "rows.jsonl", [*ROWS, {"question": "What?", "answer": " "}])
    data = load_data(str(file))
    assert (len(data.rows), data.skipped) == (5, 1)
    assert "1 without an answer skipped" in data.summary()


def test_limit_reads_no_further(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert len(load_data(str(file), limit=2).rows) == 2


def test_format_given_by_the_user_wins(tmp_path):
    file = write(tmp_path, "rows.jsonl", [{"text": "whole", "question": "q", "answer": "a"}])
    assert load_data(str(file)).format == "question_answer"
    data = load_data(str(file), data_format="text")
    assert (data.rows, data.recognised) == (({"text": "whole"},), False)
    assert "read as text" in data.summary()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a.jsonl, line 3 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl, line 2 is list, not an object"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y"}\n',
            r"line 2 \(text\): no field 'text' \(it has txt\)",
        ),
        ("a.json", '[{"text": "x"},\n {"text": ]', r"a.json is not JSON: .* line 2"),
        ("a.json", '[{"text": "x"}, {"text": null}]', r"a.json, row 2 \(text\): field 'text' is null"),
        ("a.json", "7", "holds no list of rows"),
        ("a.csv", "question,answer\na,b\nc,d,e\n", "line 3 has 3 fields, the header 2: put quotes"),
        ("a.csv", "question,answer\nWho, me?,yes\n", "a.csv, line 2 has 3 fields, .* that holds a comma"),
        ("a.csv", 'question,answer\na,"b\nb",\nc,d,e\n', "line 4 has 3 fields"),
        ("a.csv", "text\n" + "x" * 200_000 + "\na,b\n", "line 3 has 2 fields"),
        ("a.tsv", "question\tanswer\na\tb\tc\n", "a.tsv, line 2 has 3 .* that holds a tab"),
        ("a.csv", 'question,answer\na,"b\n', r"a\.csv: the quote that opens in line 2 is not closed"),
        ("a.csv", 'question,answer\n"a\nb","c ""d"" e"\nf,"g""\nh,i', "opens in line 4 is not closed: end"),
        ("a.csv", 'question,"answer\na,b\n', "opens in line 1 is not closed"),
        ("a.tsv", 'question\tanswer\na, "b\tc\n\nd\t"e', "opens in line 4 is not closed"),
        ("a.csv", "question\na\n", "fit no format"),
        ("a.parquet", "nothing", "cannot read .*a.parquet"),
        ("a.jsonl", "", r"nothing to train on: it holds no rows"),
        ("a.csv", "", "it holds no rows"),
        ("a.csv", "text\n", "it holds no rows"),
        ("a.txt", " \n\n \n", "all 1 rows are empty|it holds no rows"),
        ("a.jsonl", '{"text": " "}\n{"text": ""}\n', "all 2 rows are empty"),
        ("a.pdf", "x", "cannot read .pdf; lowmem reads .txt"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        load_data(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        load_data(str(tmp_path / "a.txt"))


def test_prompts_of_two_kinds(tmp_path):
    pair = {"prompt": "a", "completion": "b"}
    chat = {k: [{"role": r, "content": "x"}] for k, r in (("prompt", "user"), ("completion", "assistant"))}
    with pytest.raises(UserError, match="line 2: prompts are text in some rows and messages in others"):
        load_data(str(write(tmp_path, "rows.jsonl", [pair, chat])))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("factbok", "did you mean 'factbook'"),
        ("./nowhere.jsonl", "no file or folder './nowhere.jsonl'"),
        ("owner/data.jsonl", "no file or folder 'owner/data.jsonl'"),
    ],
)
def test_nothing_of_that_name(name, words):
    with pytest.raises(UserError, match=words):
        load_data(name)


def test_hub_without_network(monkeypatch):
    monkeypatch.setattr(hub, "online", lambda: False)
    with pytest.raises(UserError, match=r"owner/set is not in the local cache .* --data factbook"):
        load_data("owner/set")


def test_hub_rows_are_converted_like_others(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ROWS

    monkeypatch.setattr(hub, "online", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load_data("owner/set:small", split="test").rows) == 5
    assert asked == [(("owner/set", "small"), {"split": "test"})]


def test_folder_of_texts_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no data"):
        load_data(str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    assert [row["text"] for row in load_data(str(tmp_path)).rows] == ["one", "two"]


def test_places(tmp_path):
    file = write(tmp_path, "rows.csv")
    assert [str(place) for place, _ in load_rows(str(file))][-1] == f"{file}, row 5"
