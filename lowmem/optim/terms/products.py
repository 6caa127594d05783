"""Products of 16-bit matrices, on a device that has instructions for them or not.

Without any, as on processors before AVX-512, torch multiplies bf16 and fp16 element by element: some
products take forty times as long as in fp32. There the factors are cast, the larger one strip by strip, and
the result is rounded once, as instructions round what they have added up in fp32: the same numbers anywhere,
but for the order in which they are added.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.engine.cutting import sizes

HALF = (torch.bfloat16, torch.float16)
STRIP = 1 << 20
"""Elements of a factor that are cast at a time."""


@functools.cache
def native(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has instructions for products of a dtype."""
    if dtype not in HALF:
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    asked = getattr(torch.ops.mkldnn, name, None)
    if asked is None:  # no public name says it
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return bool(asked())


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B of two matrices of one dtype, in that dtype.

    What stands for a tensor of a card, on meta or a fake one, is multiplied as there: its policy is named.
    """
    here = sizes(a.device).at_hand or (a.device.type == "cpu" and not hasattr(a, "fake_mode"))
    return a @ b if native(a.dtype) or not here else in_fp32(a, b)


def in_fp32(a: Tensor, b: Tensor, base: Tensor | None = None, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """alpha A B + beta C, matrices or batches of them, of 16-bit factors: in fp32, rounded once."""
    out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=a.device)
    whole = base.expand(out.shape) if base is not None and beta else None
    for place, x, y in _strips(a, b):
        part = x @ y
        if base is not None:
            part = part.mul_(alpha)
        out[place] = part if whole is None else part.add_(whole[place], alpha=beta)
    return out


def _strips(a: Tensor, b: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Where a part of a product goes, and its factors in fp32: rows of A, columns of B, some of a batch."""
    if a.dim() == 3:
        each = max(1, STRIP // max(1, a[0].numel(), b[0].numel())) if len(a) else 1
        for i in range(0, len(a), each):
            yield slice(i, i + each), a[i : i + each].float(), b[i : i + each].float()
        return
    each = max(1, STRIP // max(1, a.shape[1]))
    if a.numel() >= b.numel():
        whole = b.float()
        for i in range(0, a.shape[0], each):
            yield slice(i, i + each), a[i : i + each].float(), whole
        return
    whole = a.float()
    for j in range(0, b.shape[1], each):
        yield (slice(None), slice(j, j + each)), whole, b[:, j : j + each].float()
