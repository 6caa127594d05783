"""Whether the examples of a packed row stay apart, asked of a model without weights.

Training asks by a gradient (`models.computing.packed`), which needs numbers. What can be seen without:

    the model refuses a packed row itself, as hybrids do whose kernels are not installed
    it never asks transformers where examples begin
    it has layers that carry a state from token to token, and did not refuse

Of the last, those that know where examples begin hand it to kernels, and refuse without these: one that
takes a packed row where none are installed does not know.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from lowmem.errors import first_line
from lowmem.models.computing import attention, packed

ATTENTIONS = ("full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe")
"""Kinds of layers that carry no state: of other tokens they know by a mask, or nothing."""
KERNELS = "causal_conv1d"
"""The package by which layers with a state keep examples apart."""


def unpackable(model: Any, setting: str, remedy: str) -> str:
    """Why a model's packed rows would not be trained on; "" where they would.

    Args:
        model: on meta or fake tensors; setting: that asks for packed rows; remedy: what to give instead.
    """
    if attention.applies(model):
        return ""
    if refusal := _refused(model):
        kind = type(attention.base(model)).__name__
        return f"{setting}: {kind} refuses packed rows ({refusal}); {remedy}"
    if _carries_state(model) or not packed.asks_where_examples_begin(model):
        return packed.mixing(model, setting, remedy)
    return ""


def _refused(model: Any) -> str:
    """What a model says to a packed row of two examples, "" where it takes it."""
    sizes = packed.FIRST, packed.SECOND
    starts = torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32)
    numbers = [torch.full((1, n), i, dtype=torch.int32) for i, n in enumerate(sizes)]
    row = {
        "position_ids": torch.cat([torch.arange(n) for n in sizes])[None],
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "seq_idx": torch.cat(numbers, dim=1),
        "max_length_q": max(sizes), "max_length_k": max(sizes),
    }  # fmt: skip
    try:
        with torch.no_grad():
            attention.base(model)(input_ids=torch.arange(sum(sizes))[None], use_cache=False, **row)
    except (ValueError, NotImplementedError) as error:
        return first_line(error)
    except (RuntimeError, TypeError, IndexError):  # of a trace, which its own step will meet
        return ""
    return ""


def _carries_state(model: Any) -> bool:
    """Whether layers carry a state past the beginning of an example."""
    config = attention.base(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return not set(kinds) <= set(ATTENTIONS) and find_spec(KERNELS) is None
