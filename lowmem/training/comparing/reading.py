"""A small model that knows nothing and real text to learn from, both from this machine.

    pydoc_data.topics -> train, validation, heldout .jsonl      the reference of Python, which ships with it
    a tokenizer of that text, and a Llama of random weights     a folder that `--model` takes

The text is cut at blank lines; what stands in more than one topic is kept once. Which topic is on which side
its name decides, so that no held-out paragraph was read in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
}
VOCABULARY = 4096
SECTION = 2000  # characters of a row
SIDES = {"validation": 1, "heldout": 3}  # of ten topics


def texts(folder: Path) -> Path:
    """Rows of text, a file for each side; the folder."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], **{side: [] for side in SIDES}}
    seen = set[str]()
    for name in sorted(topics):
        parts = [part for part in topics[name].split("\n\n") if part.strip() and part not in seen]
        seen.update(parts)
        rows[_side(name)] += _sections(parts)
    for side, some in rows.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (folder / f"{side}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _side(topic: str) -> str:
    place = int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 10
    return "validation" if place < SIDES["validation"] else "heldout" if place < SIDES["heldout"] else "train"


def _sections(parts: list[str]) -> Iterator[str]:
    """Paragraphs joined to rows."""
    held = ""
    for part in parts:
        if held and len(held) + len(part) > SECTION:
            yield held
            held = ""
        held = f"{held}\n\n{part}" if held else part
    if held:
        yield held


def small_model(folder: Path, text: Path) -> Path:
    """The folder of a Llama of 9.7M random weights, and of a tokenizer made of the training text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "model.safetensors").is_file():
        return folder
    lines = (text / "train.jsonl").read_text(encoding="utf-8").splitlines()
    made = ByteLevelBPETokenizer()
    said = {"vocab_size": VOCABULARY, "special_tokens": ["<|end|>"], "show_progress": False}
    made.train_from_iterator((json.loads(line)["text"] for line in lines), **said)
    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **ends)  # type: ignore[no-untyped-call]
    of = LlamaConfig(
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, **LLAMA,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(of)
    drawn = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0.0, of.initializer_range, generator=drawn)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
