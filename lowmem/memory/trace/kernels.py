"""Make a step on fake CPU tensors choose what a GPU would choose.

Transformers and torch look at the device in a few places. A plan for a CUDA device is traced on fake CPU
tensors (fake CUDA tensors abort the process in backward on a build without CUDA), so for its duration:

* attention calls the fused CUDA operators by name; their shape and gradient formulas need no device;
* in packed rows each text attends by itself, on either device; how long it is makes no difference, and of
  very many some are looked at together;
* dropout is `native_dropout` (a byte per element), not a full-precision mask;
* softmax of float16 scores reads them as they are, and what its CUDA kernels allocate inside is allocated;
* the search for packed sequences, which reads values, is answered "none": the real run finds none and skips
  the mask, while a trace would build it and save it in every layer;
* products of experts, whose shape formula of torch knows bf16 alone, go by transformers' for the rest;
* the tiles of TRL's chunked loss, which Triton kernels overwrite in place, allocate nothing.

Everything is put back on exit. Nothing here knows a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowmem.memory.run import Run
from lowmem.models.computing.attention import Attention, by_example, sdpa
from lowmem.models.computing.wide import wide
from lowmem.sources.directions import Pen, Perturbation, pieces

EXAMPLES = "lowmem_examples"
_SOFTMAX = torch.nn.functional.softmax
PIECES = 32
"""Of the texts of packed rows that a trace looks at one by one, or some together."""
AMPERE = 8.0
"""Compute capability from which on there are flash attention and bf16 arithmetic."""


def attention_of(capability: float | None) -> Callable[..., Tensor]:
    """What `scaled_dot_product_attention` runs on a CUDA card: flash, memory-efficient or math.

    Flash attention needs sm_80; the memory-efficient kernel takes as many key as query heads, and bf16 from
    sm_80 on. Everything else is math: the scores exist, in fp32. So is what is asked for by its parts, as
    where weights carry tangents.

    Args:
        capability: compute capability of the card; None for 8.0 or more.
    """
    recent = capability is None or capability >= AMPERE
    half = (torch.float16, torch.bfloat16) if recent else (torch.float16,)
    allowed: Any = torch.backends.cuda

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        plain = attn_mask is None and query.ndim == 4 and query.shape[-1] == value.shape[-1] <= 256
        if recent and plain and query.dtype in half and allowed.flash_sdp_enabled():
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            found: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
            return found
        paired = query.ndim == 4 and key.shape[1] == query.shape[1]
        fused = paired and allowed.mem_efficient_sdp_enabled()
        if fused and query.dtype in (torch.float32, *half):
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        math = torch.ops.aten._scaled_dot_product_attention_math
        mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        scored: Tensor = math(query, key, value, mask, dropout_p, is_causal, **options)[0]
        return scored

    return attention


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    bias = None if mask is None else _additive(mask, q.dtype)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, dropout, causal, scale=scale
    )[0]
    return out


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as torch hands it to its kernels: made anew in each layer, and saved."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def scratch(func: Any, args: Any) -> tuple[Tensor, ...]:
    """What CUDA's softmax kernels allocate inside an operation, beside what it returns.

    Backward multiplies gradient and output into a tensor of their own; the softmax of the math attention
    keeps its result and a mask of its -inf.
    """
    if func is torch.ops.aten._softmax_backward_data.default:
        return (torch.empty_like(args[0]),)
    if func is torch.ops.aten._safe_softmax.default:
        return torch.empty_like(args[0]), torch.empty_like(args[0], dtype=torch.bool)
    return ()


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if p == 0.0 or not training:
        return input
    return torch.native_dropout(input, p, training)[0]


def _bf16(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
    return weight.dtype == torch.bfloat16


def _softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    if input.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
        return torch.ops.aten._softmax(input, dim, True)  # type: ignore[no-any-return]
    return _SOFTMAX(input, dim, _stacklevel, dtype)


@contextmanager
def fused_noise() -> Iterator[None]:
    """Directions, and copies displaced along them, are written by one compiled kernel, without scratch."""

    def displaced(self: Perturbation, parameter: str, w: Tensor, distance: float, start: int = 0) -> Tensor:
        return torch.empty_like(w)

    def draw(self: Pen, start: int, stop: int) -> Tensor:
        cells = pieces(start, stop, self.device, fixed=self.compile)
        return torch.empty(sum(size for _, size in cells), device=self.device)[: stop - start]

    with patch.object(Perturbation, "displaced", displaced), patch.object(Pen, "draw", draw):
        yield


def _alike(length: int) -> Attention:
    """An attention over texts of one length that lie end to end: as many operations for all as for one."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cut = (torch.unflatten(x, 2, (-1, length)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out, weights = sdpa(module, *cut, mask, **kwargs)
        return out.flatten(0, 1).unsqueeze(0), weights

    return attention


@contextmanager
def registered(device: str, lengths: list[int]) -> Iterator[None]:
    """Make the attention of a plan's packed rows known to transformers, for a while.

    Args:
        device: the device type that the plan is for.
        lengths: of the texts of packed rows; for them there is no mask.
    """
    from transformers import AttentionInterface

    attend = by_example(sdpa, lengths, widens=device == "cpu")
    if len(lengths) > PIECES and len(set(lengths)) == 1:
        count = -(-len(lengths) // PIECES)
        pieces = [min(count, len(lengths) - i) * lengths[0] for i in range(0, len(lengths), count)]
        attend = by_example(_alike(lengths[0]), pieces, widens=device == "cpu")
    AttentionInterface.register(EXAMPLES, attend)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(EXAMPLES, None)


@contextmanager
def semantics(
    device: str, *, lengths: list[int], chunked: bool, capability: float | None = None
) -> Iterator[None]:
    """Everything that a step on fake tensors must be told, for a device type ("cuda" or "cpu").

    Args:
        device: the device type that the plan is for.
        lengths: of the texts that share a row, empty where none do: the search for them finds nothing then.
        chunked: TRL's chunked loss is used.
        capability: compute capability of the card; None for 8.0 or more.
    """
    masking = importlib.import_module("transformers.masking_utils")
    experts = importlib.import_module("transformers.integrations.moe")
    functional = torch.nn.functional
    with ExitStack() as stack:
        stack.enter_context(registered(device, lengths))
        stack.enter_context(patch.object(experts, "_can_use_grouped_mm", _bf16))
        if not lengths:
            stack.enter_context(
                patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None)
            )
        if device == "cuda":
            chosen = {"scaled_dot_product_attention": attention_of(capability), "dropout": _dropout}
            for name, function in (chosen | {"softmax": _softmax}).items():
                stack.enter_context(patch.object(functional, name, function))
        if device == "cuda" and chunked:
            kernels = importlib.import_module("trl.kernels.chunked_logprob")
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                stack.enter_context(patch.object(kernels, name, lambda *args, **kwargs: None))
        yield


def products(model: nn.Module, run: Run) -> AbstractContextManager[Any]:
    """How a model's products are taken: as on this processor, where it is one that the plan is for."""
    dtype = getattr(torch, run.autocast_dtype) if run.autocast else None
    return nullcontext() if run.device == "cuda" else wide(model, dtype)
