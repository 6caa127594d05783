"""The causal language-model loss over label positions only.

Most tokens of a fine-tuning batch are prompt or padding and carry no label. The
stock loss makes logits for all of them: (tokens, vocabulary) in the weights'
dtype and again in fp32. Here the model's own forward makes logits for the label
positions alone (`logits_to_keep` as a boolean mask), so whatever the model does
to its logits, such as Gemma 2's soft cap, is kept. Then

    loss = sum_i CE(fp32 logits_i, label_i) / num_items

with num_items the label tokens of the whole accumulation window.

Where even those logits are large, the caller's chunked loss is cheaper in
memory: `pays` draws the line, the same for every batch of one shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.computing.attention import base, is_prompted

IGNORE = -100
LIMIT = 512 << 20
"""Bytes of logits and their gradients above which a chunked loss is the better choice."""


def supports(model: nn.Module) -> bool:
    """Whether the model can make logits at masked positions only.

    Args:
        model: unwrapped; a PEFT model is looked into.
    """
    if is_prompted(model):
        return False  # virtual tokens shift the positions
    kind = type(base(model))
    try:
        from transformers.modeling_utils import slice_logits_to_keep  # noqa: F401
    except ImportError:  # before transformers 5.20 a mask is not understood
        return False
    return kind.__module__.startswith("transformers.") and (
        "logits_to_keep" in inspect.signature(kind.forward).parameters
    )


def logits_bytes(tokens: int, vocab_size: int, element_size: int) -> int:
    """Bytes alive at once for the loss of `tokens` label positions.

    Logits and their gradient in the weights' dtype, and in fp32 the copy, its
    log-softmax and its gradient.
    """
    return tokens * vocab_size * (2 * element_size + 3 * 4)


def pays(labels: Tensor, vocab_size: int, element_size: int) -> bool:
    """Whether the loss over label positions stays within `LIMIT` for labels of (batch, length)."""
    return logits_bytes(int((labels[..., 1:] != IGNORE).sum()), vocab_size, element_size) <= LIMIT


def label_loss(model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
    """Next-token cross entropy over the labels that are not -100.

    Args:
        model: causal language model for which `supports` holds.
        inputs: its keyword arguments with `labels` (batch, length), unshifted.
        num_items: divisor; the label tokens of this batch when None.

    Returns:
        0-D fp32; 0, still connected to the weights, where no token has a label.
    """
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    labels = inputs["labels"]
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORE
    logits = model(**{**rest, "use_cache": False, "logits_to_keep": keep}).logits  # (tokens, vocabulary)
    targets = labels[:, 1:][keep[:, :-1]]
    total = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
    if num_items is None:
        num_items = max(targets.numel(), 1)
    return total / torch.as_tensor(num_items, device=total.device)
