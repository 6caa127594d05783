"""A checkpoint belongs to what its data said, not only to where it lay."""

import dataclasses
import json

import pytest
from tiny_folder import make_model, make_rows
from tiny_runs import keep_only

from lowmem.config import RunConfig
from lowmem.errors import CheckpointError
from lowmem.recipes.finetune import finetune
from lowmem.training.folder.settings import CONTENT, changes, content

ROWS = [{"text": "a"}, {"text": "b"}]


def test_rows_that_say_something_else_are_refused():
    was = {"data": "rows.jsonl", **content(ROWS, ROWS)}
    assert changes(was, was, "checkpoint-2", 2, 4) == {}
    for now, what in (
        (content(ROWS[::-1], ROWS), "the rows to train on say"),
        (content(ROWS, ROWS[:1]), "the held-out rows say"),
        (content(ROWS[:1], ROWS[:1]), "the rows to train on and the held-out rows say"),
    ):
        with pytest.raises(CheckpointError, match=rf"{what}.*\(data: rows.jsonl\).*put them back"):
            changes(was, was | now, "checkpoint-2", 2, 4)


def test_a_checkpoint_from_before_goes_on():
    now = {"data": "rows.jsonl", **content(ROWS, ROWS)}
    assert set(now) - {"data"} == set(CONTENT)
    assert changes({"data": "rows.jsonl"}, now, "checkpoint-2", 2, 4) == {}


def test_a_file_that_was_edited_meanwhile_is_noticed(tmp_path):
    model, data = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.jsonl")
    run = RunConfig(
        model=str(model), optim="adamw", data=str(data), output_dir=str(tmp_path / "out"), steps=4,
        save_steps=2, batch_size=2, dtype="float32", report=False, eval_rows=4,
    )  # fmt: skip
    finetune(run)
    keep_only(tmp_path / "out", 2)
    lines = data.read_text().splitlines()
    again = dataclasses.replace(run, resume=True)
    edited = json.dumps(json.loads(lines[-1]) | {"answer": "another"})
    data.write_text("\n".join([*lines[:-1], edited]) + "\n")
    with pytest.raises(CheckpointError, match="put them back as they were"):
        finetune(again)
    data.write_text("\n".join(lines) + "\n")
    assert finetune(again)["resumed_from"] == "checkpoint-2"
