"""What is wrong with a base, or with rows for it, is said before the first step."""

import json

import pytest
import torch
import transformers
from tiny_folder import make_model, make_rows, tokenizer

from lowmem.config import RunConfig
from lowmem.errors import UserError
from lowmem.recipes.finetune import finetune

ROWS = {"optim": "adamw", "steps": 1, "batch_size": 2, "dtype": "float32", "report": False, "eval_rows": 4}


def gpt2(folder):
    config = transformers.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", [True, False])
def test_rows_past_the_last_position_are_refused_or_cut(tmp_path, packing):
    model, data = gpt2(tmp_path / "m"), tmp_path / "rows.jsonl"
    row = {"prompt": "x" * 20, "completion": "y" * 90}
    data.write_text("".join(json.dumps({**row, "n": n}) + "\n" for n in range(12)))
    values = {**ROWS, "model": str(model), "data": str(data), "packing": packing}
    with pytest.raises(UserError, match=r"the model has 64 positions; give --seq-len 64 or less"):
        finetune(RunConfig(**values, seq_len=128, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    finetune(RunConfig(**values, seq_len=64, output_dir=str(tmp_path / "out")))


def test_a_base_with_numbers_that_are_not_finite_is_refused(tmp_path):
    model, data = make_model(tmp_path / "m"), make_rows(tmp_path / "rows.jsonl")
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    broken.save_pretrained(model)
    run = RunConfig(**ROWS, model=str(model), data=str(data), output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"1 of its tensors .*model\.norm\.weight.*get them anew"):
        finetune(run)
    assert not (tmp_path / "out").exists()
