"""Small models of the real architectures, and one real training step watched by two trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn

from lowmem.memory.trace.replica import phase_hooks
from lowmem.memory.trace.tracker import Tracker
from lowmem.models.computing.wide import wide

BASE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "qwen2.5": lambda: transformers.Qwen2Config(**BASE),
    "qwen3": lambda: transformers.Qwen3Config(**BASE, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **BASE, head_dim=16, sliding_window=32, query_pre_attn_scalar=16
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=512,
        hidden_size=64,
        ffn_dim=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=128,
    ),
}


def model(family: str, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False) -> nn.Module:
    """A model with random weights, in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.use_cache = False
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if checkpointing:
        enable = getattr(made, "activation_checkpointing_enable", None) or made.gradient_checkpointing_enable
        enable()
    return made.train()


def batch(rows: int = 2, length: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).view(rows, length) % 500
    return {"input_ids": ids, "labels": ids.clone()}


def loss(made: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As `Trainer.compute_loss`: the outputs are gone before backward."""
    return made(**inputs, use_cache=False, num_items_in_batch=torch.ones((), dtype=torch.long)).loss


def peaks_of(
    made: nn.Module,
    checkpointing: bool = False,
    inputs: dict[str, torch.Tensor] | None = None,
    constants: Iterable[torch.Tensor] = (),
    released: bool = False,
) -> dict[str, dict[str, int]]:
    """Phases of a real step by our tracker: bytes by category. Constants are held beside parameters.

    Released gradients are gone as soon as they are there, and nothing is left to step.
    """
    inputs = inputs or batch()
    tracker = Tracker()
    tracker.register([*made.parameters(), *made.buffers(), *constants], "weights")
    tracker.register(inputs.values(), "activations")

    def keep(p: torch.Tensor) -> None:
        tracker.register([p.grad], "gradients")

    def let_go(p: torch.Tensor) -> None:
        tracker.claim(p.grad, "gradients")
        p.grad = None

    for p in made.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(let_go if released else keep)
    with tracker, wide(made), phase_hooks(made, tracker, checkpointing=checkpointing):
        tracker.enter("forward")
        value = loss(made, inputs)
        tracker.enter("loss backward", "logits")
        value.backward()
        del value
        if not released:
            tracker.enter("optimizer step", "workspace")
    return {name: dict(moment.bytes) for name, moment in tracker.moments().items()}
