"""Tables as people and programs write them: quotes, blanks and headers of all habits."""

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
