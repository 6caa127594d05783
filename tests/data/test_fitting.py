"""Rows whose answers seq_len cuts off are counted, said aloud and left out, packed or not."""

import importlib
import json

import pytest

from lowmem.config import RunConfig
from lowmem.console import Console
from lowmem.data.examples import tokenized
from lowmem.data.fitting import fitting
from lowmem.data.load import ensure_chat_template, load_data
from lowmem.errors import UserError

recipe = importlib.import_module("lowmem.recipes.finetune")
LONG = "Why? " * 60


class Heard(Console):
    """Remembers what it was told."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def question(i, long):
    return {"question": f"{LONG if long else ''}What is {i} + 1?", "answer": str(i + 1)}


@pytest.fixture
def config(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 257, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, eos_token_id=256, pad_token_id=256))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return RunConfig(
        model=str(tmp_path / "model"),
        data=write(tmp_path / "rows.jsonl", [question(i, i % 2 == 1) for i in range(36)]),
        eval_data=write(tmp_path / "held.jsonl", [question(100 + i, i == 0) for i in range(4)]),
        optim="adamw",
        dtype="float32",
        seq_len=128,
        steps=1,
        output_dir=str(tmp_path / "out"),
        report=False,
    )


def prepared(config, **values):
    values = RunConfig(**{**vars(config), **values})
    heard = Heard()
    with importlib.import_module("lowmem.models.quiet").quiet():
        return recipe.prepare(values, recipe.arguments(values), heard), heard.said


@pytest.mark.parametrize("packing", [True, False])
def test_rows_without_an_answer_left_are_said_and_left_out(config, packing):
    trainer, said = prepared(config, packing=packing)
    about = [text for text in said if "left out" in text]
    assert len(about) == 2
    assert (
        "(train): 18 of 36 rows have no answer left within seq_len 128 and are left out: raise seq_len"
        in (about[0])
    )
    assert "1 of 4 rows have no answer left within seq_len 128" in about[1]
    for dataset, rows in ((trainer.train_dataset, 18), (trainer.eval_dataset, 3)):
        assert sum(len(row.get("seq_lengths", [1])) for row in dataset) == rows
    assert "18 rows" in trainer.data_summary["train"]
    assert "18 with the answer beyond seq_len left out" in trainer.data_summary["train"]
    assert any(text.startswith("one example") and "[[" in text for text in said)


def test_rows_that_fit_are_all_trained_on(config):
    trainer, said = prepared(config, seq_len=512, packing=False)
    assert len(trainer.train_dataset) == 36
    assert not [text for text in said if "left out" in text]


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_nothing_left_is_an_error_before_anything_is_written(config, tmp_path, which):
    file = write(tmp_path / "long.jsonl", [question(200 + i, True) for i in range(5)])
    with pytest.raises(UserError, match=r"all 5 rows .* within seq_len 128: raise seq_len") as caught:
        recipe.finetune(RunConfig(**{**vars(config), which: file}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Kenya is in", "completion": " Africa."},
        {
            "prompt": [{"role": "user", "content": "Where?"}],
            "completion": [{"role": "assistant", "content": "x"}],
        },
    ],
)
def test_the_limit_is_the_first_token_of_the_answer(row, tokenizer):
    ensure_chat_template(tokenizer)
    (example,) = tokenized(row, tokenizer)
    prompt = example.labels().count(-100)
    assert example.answers(prompt) == 0
    assert example.answers(prompt + 1) == 1


def test_texts_always_fit(tokenizer, tmp_path):
    data = load_data(write(tmp_path / "a.jsonl", [{"text": LONG}]))
    assert fitting(data, tokenizer, 8, Heard()).data == data


def test_a_loss_of_zero_has_no_change_in_percent():
    shown = importlib.import_module("lowmem.cli.finetune")._before_after
    assert shown(0.0, 0.0) == "0.000 -> 0.000"
    assert shown(2.0, 1.0) == "2.000 -> 1.000 (-50%)"


def test_a_large_row_is_said(tokenizer, tmp_path, monkeypatch):
    ensure_chat_template(tokenizer)
    monkeypatch.setattr("lowmem.data.fitting.LARGE", 400)
    rows = [question(1, False), {"question": "Who? " * 100, "answer": "x"}]
    heard = Heard()
    fitting(load_data(write(tmp_path / "a.jsonl", rows)), tokenizer, 4096, heard)
    assert [text for text in heard.said if "a.jsonl, line 2: 0 million characters in one row" in text]
    assert len([text for text in heard.said if "takes a while" in text]) == 1
