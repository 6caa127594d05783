"""Make a step on fake CPU tensors choose what a GPU would choose.

Transformers and torch look at the device in a few places. A plan for a CUDA device is traced on fake CPU
tensors (fake CUDA tensors abort the process in backward on a build without CUDA), so for its duration:

* attention calls the fused CUDA operators by name; their shape and gradient formulas need no device;
* in packed rows each text attends by itself, on either device; how long it is makes no difference;
* dropout is `native_dropout` (a byte per element), not a full-precision mask;
* the search for packed sequences, which reads values, is answered "none": the real run finds none and skips
  the mask, while a trace would build it and save it in every layer;
* products of experts, whose shape formula of torch knows bf16 alone, go by transformers' for the rest;
* the tiles of TRL's chunked loss, which Triton kernels overwrite in place, allocate nothing.

Everything is put back on exit. Nothing here knows a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lowmem.models.attention import by_example, sdpa
from lowmem.sources.directions import Direction

# "flash" in the name would make transformers look for a kernel on the Hub.
FUSED, EXAMPLES = "lowmem_fused", "lowmem_fused_examples"
HALF = (torch.float16, torch.bfloat16)


def fused_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `scaled_dot_product_attention` does on CUDA: flash, memory-efficient or math, in this order.

    Args:
        module: the attention module; `num_key_value_groups` says how often keys and values are repeated.
        query: (b, a, s, d).
        key: (b, k, s, d).
        value: (b, k, s, d).
        attention_mask: None (causal) or a boolean or additive mask (b, 1, s, s).
        dropout: probability.
        scaling: factor of the scores; None for 1 / sqrt(d).
        **kwargs: ignored, as the interface of transformers demands.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    native = attention_mask is None and query.shape[-1] <= 256
    if groups > 1 and not native:
        key, value = (_repeat(x, groups) for x in (key, value))
    if native and query.dtype in HALF:
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, attention_mask is None, False, scale=scaling
        )[0]
    elif key.shape[1] == query.shape[1]:
        out = _efficient(query, key, value, attention_mask, dropout, scaling)
    else:  # fp32 with grouped queries: neither fused kernel takes it
        out = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, None, dropout, True, scale=scaling, enable_gqa=True
        )[0]
    return out.transpose(1, 2).contiguous(), None


def _repeat(x: Tensor, groups: int) -> Tensor:
    b, k, s, d = x.shape
    return x[:, :, None].expand(b, k, groups, s, d).reshape(b, k * groups, s, d)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    bias = mask
    if (
        mask is not None and mask.dtype == torch.bool
    ):  # torch turns it into an additive mask, per layer, and saves it
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, dropout, mask is None, scale=scale
    )[0]
    return out


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if p == 0.0 or not training:
        return input
    return torch.native_dropout(input, p, training)[0]


def _bf16(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
    return weight.dtype == torch.bfloat16


@contextmanager
def fused_noise() -> Iterator[None]:
    """Displaced copies of zeroth-order sources are written by one compiled kernel, without scratch."""

    def displaced(self: Direction, parameter: str, w: Tensor, distance: float) -> Tensor:
        return torch.empty_like(w)

    with patch.object(Direction, "displaced", displaced):
        yield


@contextmanager
def registered(device: str, lengths: list[int]) -> Iterator[None]:
    """Make the attentions of a plan known to transformers, for a while.

    Args:
        device: the device type that the plan is for.
        lengths: of the texts of packed rows; for them there is no mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(FUSED, fused_attention)
    AttentionInterface.register(EXAMPLES, by_example(fused_attention if device == "cuda" else sdpa, lengths))
    AttentionMaskInterface.register(FUSED, sdpa_mask)
    try:
        yield
    finally:
        AttentionMaskInterface._global_mapping.pop(FUSED, None)
        for name in (FUSED, EXAMPLES):
            AttentionInterface._global_mapping.pop(name, None)


@contextmanager
def semantics(device: str, *, lengths: list[int], chunked: bool) -> Iterator[None]:
    """Everything that a step on fake tensors must be told, for a device type ("cuda" or "cpu").

    Args:
        device: the device type that the plan is for.
        lengths: of the texts that share a row, empty where none do: the search for them finds nothing then.
        chunked: TRL's chunked loss is used.
    """
    masking = importlib.import_module("transformers.masking_utils")
    experts = importlib.import_module("transformers.integrations.moe")
    with ExitStack() as stack:
        stack.enter_context(registered(device, lengths))
        stack.enter_context(patch.object(experts, "_can_use_grouped_mm", _bf16))
        if not lengths:
            stack.enter_context(
                patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None)
            )
        if device == "cuda":
            stack.enter_context(patch.object(torch.nn.functional, "dropout", _dropout))
        if device == "cuda" and chunked:
            kernels = importlib.import_module("trl.kernels.chunked_logprob")
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                stack.enter_context(patch.object(kernels, name, lambda *args, **kwargs: None))
        yield
