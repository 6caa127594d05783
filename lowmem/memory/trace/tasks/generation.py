"""Answers grow token by token, beside a cache of the keys and values of all tokens before.

    cache = 2 x layers x rows x key heads x head width x (prompt + answer)

Two passes are traced, without gradients: the first, over the prompts, and the last, over one token of each
row with the whole cache. Those between hold less than the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.memory.run import Run

ANSWER = 256
"""Tokens of an answer where none are given, as `lowmem finetune` has them."""


def tokens_of_answer(run: Run) -> int:
    """The most tokens that an answer may have."""
    return run.max_completion or ANSWER


def generate(model: nn.Module, run: Run, rows: int) -> None:
    """The passes of a generation that hold most.

    Args:
        model: as it is trained; run: seq_len tokens of a prompt; rows: answers that grow side by side.
    """
    prompts = torch.zeros((rows, run.seq_len), dtype=torch.long)
    with torch.no_grad(), _whole(model):
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        token = _sampled(out.logits)
        cache = out.past_key_values
        del out
        last = run.seq_len + tokens_of_answer(run) - 2  # the last token is never read
        for layer in cache.layers:
            _grow_(layer, last)
        text = torch.zeros((rows, last + 2), dtype=torch.long)
        mask = torch.ones_like(text)
        position = torch.full((rows, 1), last)
        _sampled(model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits)
        del text, mask


def _sampled(logits: Tensor) -> Tensor:
    scores = logits[:, -1].to(dtype=torch.float32, copy=True)
    return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1)


def _grow_(layer: Any, length: int) -> None:
    """A layer's cache as it is after `length` tokens; a sliding window keeps what it sees."""
    window = getattr(layer, "sliding_window", None)
    kept = length if window is None else min(length, window - 1)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        setattr(layer, name, held.new_empty((*held.shape[:2], kept, held.shape[3])))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Within it nothing is recomputed: a layer that recomputes has no cache."""
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in recomputing:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in recomputing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
