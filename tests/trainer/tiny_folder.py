"""A tiny model with a tokenizer in a folder, and rows to train it on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens, without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_, **names)


def make_model(folder: Path, dtype: torch.dtype = torch.float32, hidden: int = 32) -> Path:
    """Save model and tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=3 * hidden // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_rows(path: Path, count: int = 40) -> Path:
    """Question and answer rows whose answers follow a rule."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}" * (1 + i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
