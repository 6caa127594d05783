"""A tiny chat model on disk, and rows to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={a: i for i, a in enumerate(letters)} | {"</s>": 256}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty questions and answers."""
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {i} plus {i}?", "answer": f"It is {i + i}."} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def flags(tiny_model: Path, rows: Path, tmp_path: Path) -> list[str]:
    """A run of a second or two."""
    values: dict[str, Any] = {
        "model": tiny_model,
        "optim": "galore",
        "optim-args": "rank=4,update_proj_gap=2",
        "data": rows,
        "eval-rows": 4,
        "seq-len": 96,
        "steps": 4,
        "save-steps": 2,
        "logging-steps": 1,
        "lr": 1e-2,
        "output-dir": tmp_path / "out",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
