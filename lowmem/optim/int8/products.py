"""What layers do with int8 weights: decode, multiply, free; and again in the backward pass.

    forward   y = x W' + b                 W = decode(codes), in the dtype of the product, then freed
    backward  x' = y' W, W' = y'' x        W decoded anew; of the weight, codes alone are kept between

Products are those of the compute dtype; none is taken in int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem.optim.int8.coding import BLOCK
from lowmem.optim.int8.tensor import PRODUCTS, Int8Weight


class _Linear(torch.autograd.Function):
    """x W' + b, or x W + b where the weight is (inputs, outputs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None, turned: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.turned = turned
        w = weight.decode(x.dtype)
        return F.linear(x, w.t() if turned else w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wanted, to = ctx.needs_input_grad, None
        if wanted[0]:
            w = weight.decode(g.dtype)
            to = g @ (w.t() if ctx.turned else w)
            del w
        rows = g.reshape(-1, g.shape[-1])
        seen = x.reshape(-1, x.shape[-1])
        of_weight = None
        if wanted[1]:
            of_weight = (seen.t() @ rows if ctx.turned else rows.t() @ seen).to(weight.dtype)
        return to, of_weight, rows.sum(0) if wanted[2] else None, None


class _Embedding(torch.autograd.Function):
    """Rows of the table; only those that are asked for are decoded."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Int8Weight, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count, ctx.padding = len(weight), padding
        n = weight.shape[1]
        place = ids.reshape(-1, 1) * n + torch.arange(n, device=ids.device)
        rows = weight.codes[ids.reshape(-1)] * weight.scale[place // BLOCK]
        return rows.to(weight.dtype).view(*ids.shape, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        found = torch.ops.aten.embedding_dense_backward(g.contiguous(), ids, ctx.count, ctx.padding, False)
        return None, found, None


def _computed(x: Tensor) -> Tensor:
    """An input as autocast would have it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`."""
    if not isinstance(weight, Int8Weight) or weight.dim() != 2:
        return F.linear(x, weight, bias)
    found: Tensor = _Linear.apply(*_cast(x, weight, bias), False)  # type: ignore[no-untyped-call]
    return found


def addmm(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Tensor:
    """As `torch.addmm`, which layers with an (inputs, outputs) weight call."""
    if not isinstance(weight, Int8Weight) or scales or bias.dim() != 1:
        return torch.addmm(bias, x, weight, **scales)
    found: Tensor = _Linear.apply(*_cast(x, weight, bias), True)  # type: ignore[no-untyped-call]
    return found


def _cast(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x = _computed(x)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(f"int8 weights that compute in {weight.dtype} met an input of {x.dtype}")
    return x, weight, None if bias is None else bias.to(x.dtype)


def embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """As `torch.nn.functional.embedding`."""
    if not isinstance(weight, Int8Weight) or max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    found: Tensor = _Embedding.apply(ids, weight, padding)  # type: ignore[no-untyped-call]
    return found


PRODUCTS.update({F.linear: linear, torch.addmm: addmm, F.embedding: embedding})
