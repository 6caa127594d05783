"""Several data sets, each as often as its weight says, and nothing on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lowmem.data.mix import check_names, mixed, weights
from lowmem.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("a.jsonl", [{"question": f"a{i}", "answer": "yes"} for i in range(40)])
    write("b.jsonl", [{"instruction": f"b{i}", "output": "no"} for i in range(20)])
    write("c.jsonl", [{"text": f"c{i}"} for i in range(20)])
    write("d.jsonl", [{"question": f"a{i}", "answer": "yes"} for i in range(20)])
    write("held.jsonl", [{"question": f"a{i}", "answer": "yes"} for i in range(39, 60)])
    return tmp_path


def asked(data: Any) -> Counter[str]:
    return Counter(row["prompt"][-1]["content"] for row in data.rows)


def test_names_and_weights() -> None:
    assert weights("a.jsonl + owner/name:config=0.5") == {"a.jsonl": 1.0, "owner/name:config": 0.5}
    assert weights("run=final/rows.jsonl") == {"run=final/rows.jsonl": 1.0}
    for text, words in (("a=0", "above 0"), ("a=inf", "at most 1000"), ("a + a=2", "named twice")):
        with pytest.raises(UserError, match=words):
            weights(text)


def test_a_sign_in_the_name_of_a_folder_is_no_weight(files: Path) -> None:
    folder = files / "v=2"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    both = {str(folder): 1.0, str(files / "a.jsonl"): 2.0}
    assert weights(f"{folder} + {files / 'a.jsonl'}=2") == both
    assert weights(f"{folder}=3") == {str(folder): 3.0}


def test_rows_are_seen_as_often_as_the_weight_says(files: Path) -> None:
    text = f"{files / 'a.jsonl'}=2.5 + {files / 'b.jsonl'}=0.5"
    train, held_out = mixed(text, rows=8, seed=1)
    seen, evaluated = asked(train), asked(held_out)
    of_a = {name: count for name, count in seen.items() if name[0] == "a"}
    of_b = {name: count for name, count in seen.items() if name[0] == "b"}
    assert (len(of_a), sum(of_a.values())) == (36, 90)
    assert set(of_a.values()) == {2, 3}
    assert (len(of_b), set(of_b.values())) == (9, {1})
    assert Counter(name[0] for name in evaluated) == {"a": 4, "b": 2}
    assert not set(seen) & set(evaluated)
    assert len(train.places) == len(train.rows)
    assert "question_answer and alpaca" in train.summary()
    again, _ = mixed(text, rows=8, seed=1)
    assert again.rows == train.rows


def test_what_is_held_out_of_one_is_not_trained_on_in_the_other(files: Path) -> None:
    train, held_out = mixed(f"{files / 'a.jsonl'} + {files / 'd.jsonl'}", rows=8)
    assert not set(asked(train)) & set(asked(held_out))


def test_other_data_to_evaluate_on_is_read_once(files: Path) -> None:
    train, held_out = mixed(f"{files / 'b.jsonl'} + {files / 'a.jsonl'}", str(files / "held.jsonl"), rows=80)
    assert sum(asked(train).values()) == 60
    assert set(asked(held_out)) == {f"a{i}" for i in range(40, 60)}


def test_texts_and_messages_do_not_mix(files: Path) -> None:
    with pytest.raises(UserError, match="do not mix"):
        mixed(f"{files / 'a.jsonl'} + {files / 'c.jsonl'}")
    with pytest.raises(UserError, match="leaves none"):
        mixed(f"{files / 'a.jsonl'} + {files / 'b.jsonl'}=0.001")


def test_each_name_is_looked_for(files: Path) -> None:
    check_names(f"{files / 'a.jsonl'} + factbook=2")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        check_names(f"{files / 'a.jsonl'} + {files / 'missing.jsonl'}")
