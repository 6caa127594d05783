"""Tables as people and programs write them: quotes, blanks and headers of all habits."""

import numpy
import pandas
import pytest

from lowmem.data.load import load_data, load_rows
from lowmem.errors import UserError


def cells(tmp_path, text, name="a.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return [tuple(row.values()) for _, row in load_rows(str(tmp_path / name))]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r'"He said \"hi\"",ok', ('He said "hi"', "ok")),
        (r'"He said \"hi, you\"",ok', ('He said "hi, you"', "ok")),
        (r'ok,"\"hi\""', ("ok", '"hi"')),
        (r'ok,"say \"hi\" and ""go"""', ("ok", 'say "hi" and "go"')),
        (r'"a \"b\" \\ \frac \n","C:\\dir\\"', ('a "b" \\ \\frac \\n', "C:\\dir\\")),
        ('"two\nlines \\"here\\"",5" pipe', ('two\nlines "here"', '5" pipe')),
        (r' "a \"b\"", "c, d"', ('a "b"', "c, d")),
        (r'"C:\dir\",ok', ("C:\\dir\\", "ok")),  # a backslash that ends a field is one
        (r'"a ""\n"" \\ b",ok', (r'a "\n" \\ b', "ok")),
    ],
)
def test_quotes_behind_a_backslash_are_quotes(tmp_path, line, expected):
    assert cells(tmp_path, f"question,answer\n{line}\nq,a\n") == [expected, ("q", "a")]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", "|")])
def test_quotes_behind_a_backslash_with_other_separators(tmp_path, name, mark):
    text = f'question{mark}answer\nq, \\"x\\"{mark}"a \\"b, c\\""\n'
    assert cells(tmp_path, text, name) == [('q, \\"x\\"', 'a "b, c"')]


@pytest.mark.parametrize("before", ["", "a,b\n", '"a\nb",c\n'])
def test_a_field_that_goes_on_behind_its_quotes_is_refused(tmp_path, before):
    line = 2 + before.count("\n")
    with pytest.raises(UserError, match=rf"a\.csv, line {line}: a field in quotes is followed by 'is it'"):
        cells(tmp_path, f'question,answer\n{before}"Dune" is it,ok\n')


def test_a_blank_before_a_quote_is_no_part_of_the_field(tmp_path):
    text = 'question, "answer"\nq1, "yes, no"\nq2,  "b" \nq3, c\nq4," d"\nq5, "e" or f\n'
    expected = [("q1", "yes, no"), ("q2", "b"), ("q3", " c"), ("q4", " d"), ("q5", ' "e" or f')]
    assert cells(tmp_path, text) == expected
    data = load_data(str(tmp_path / "a.csv"))
    assert data.rows[0]["completion"][0]["content"] == "yes, no"


@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("line", ["What is one?,It is one.", "hello,hello", "1,2", "hello,", "a," + "b" * 50])
def test_a_table_without_a_header_is_told_to_get_one(tmp_path, line, task):
    (tmp_path / "a.csv").write_text(f"{line}\nx,y\n")
    with pytest.raises(
        UserError, match=r": where they are a row, put a line of names \(question,answer\) above"
    ):
        load_data(str(tmp_path / "a.csv"), task=task)
    (tmp_path / "b.csv").write_text("The article,My Summary\nx,y\n")
    with pytest.raises(UserError) as caught:
        load_data(str(tmp_path / "b.csv"), task=task)
    assert "The article, My Summary" in str(caught.value)
    assert "where they are a row" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_texts_of_wide_characters(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("question,answer\nWo?,Köln\n".encode(encoding))
    assert [row for _, row in load_rows(str(tmp_path / "a.csv"))] == [{"question": "Wo?", "answer": "Köln"}]
    (tmp_path / "a.csv").write_bytes("question\nWo?\n".encode(encoding)[:-1])
    with pytest.raises(UserError, match=r"a\.csv is not UTF-(16|32).* text \(byte \d+\): save it as UTF-8"):
        list(load_rows(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt", "a.jsonl.gz"]
)
def test_pointers_of_git_lfs_are_no_data(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name} is a pointer of git LFS, not the data: run git lfs pull"):
        load_data(str(tmp_path / name))


def test_a_saved_data_set_of_pointers_is_no_data(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path)
    for file in tmp_path.glob("*.arrow"):
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"\.arrow is a pointer of git LFS"):
        load_data(str(tmp_path))


def framed(folder, **columns):
    file = folder / "rows.csv"
    pandas.DataFrame(columns).to_csv(file, index=False)
    return str(file)


def texts(*said):
    return numpy.array(said, dtype=object)


def test_lists_of_numpy_are_lists(tmp_path):
    """As pandas writes into a table what it has read from Parquet."""
    talk = texts({"role": "user", "content": "it's [1 2]"}, {"role": "assistant", "content": 'a "b" ...'})
    data = load_data(framed(tmp_path, messages=[talk]))
    assert data.rows[0]["prompt"][0]["content"] == "it's [1 2]"
    assert data.rows[0]["completion"][0]["content"] == 'a "b" ...'
    for name, cell in (
        ("answers", {"text": texts("x y", "z"), "answer_start": numpy.array([1, 2])}),
        ("answers", texts("x y", "z")),
        ("answer", texts("x y", "z" * 90)),
    ):
        data = load_data(framed(tmp_path, question=["q"], **{name: [cell]}))
        assert data.rows[0]["completion"][0]["content"] == "x y"
        assert "all answers but the first" in data.ignored
    chosen = load_data(
        framed(tmp_path, prompt=["q"], candidates=[texts("x", "y z")], label=[1]), task="classify"
    )
    assert chosen.rows[0]["candidates"] == ["x", "y z"]


@pytest.mark.parametrize("cell", ["[1 2 3]", "[see above]", "['a']", "['a', 'b']", "[...]"])
def test_texts_in_brackets_stay_texts(tmp_path, cell):
    data = load_data(framed(tmp_path, question=["q"], answer=[cell]))
    assert data.rows[0]["completion"][0]["content"] == cell


def test_lists_that_numpy_shortened_are_refused(tmp_path):
    long = texts(*("x" for _ in range(2000)))
    for columns in (
        {"question": ["q"], "answers": [long]},
        {"messages": [texts(*[{"role": "user"}] * 2000)]},
    ):
        with pytest.raises(UserError, match=r"row 1.*'\.\.\.' for what numpy left out.*JSONL"):
            load_data(framed(tmp_path, **columns))
