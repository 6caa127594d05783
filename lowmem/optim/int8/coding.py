"""Numbers as int8 codes with a scale for each 256 of them.

    w = scale c,  c in -127 .. 127,  scale = max |w| / 127 in fp32 when a block is made

Blocks are consecutive elements, row by row: where a row is a multiple of 256 long, parts of a row.
Blocks of that length are what chunks of a step are cut by (`engine.layout`), so that a scale is
found, and found anew, inside the kernel that steps its block. Scales are fp32: in the weight's own
16 bits, decoding and encoding again would drift where nothing moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""
MOST = 127
"""Largest code."""
LEAST = 2.0**-100
"""Smallest scale: of a block of zeros."""
PIECE = 1 << 20
"""Elements that are looked at in fp32 at a time on a CPU."""


def blocks(count: int) -> int:
    """Scales of so many elements.

    >>> blocks(257)
    2
    """
    return -(-count // BLOCK)


def divides(shape: Sequence[int]) -> bool:
    """Whether no block lies in two matrices of a stack; of other tensors it never does.

    >>> divides((2, 16, 16)), divides((2, 3, 5)), divides((3, 5))
    (True, False, True)
    """
    return len(shape) < 3 or math.prod(shape[1:]) % BLOCK == 0


def coded_bytes(count: int) -> int:
    """What so many elements take.

    >>> coded_bytes(1024)
    1040
    """
    return count + 4 * blocks(count)


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Flat codes from the beginning of a block on, and their scales, as fp32."""
    full = codes.numel() // BLOCK * BLOCK
    if full == codes.numel():
        return (codes.view(-1, BLOCK) * scale[:, None]).view(-1)
    out = torch.empty(codes.numel(), device=codes.device)
    torch.mul(codes[:full].view(-1, BLOCK), scale[: full // BLOCK, None], out=out[:full].view(-1, BLOCK))
    torch.mul(codes[full:], scale[-1:], out=out[full:])
    return out


def encoded(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of flat values, and their scales."""
    short = -values.numel() % BLOCK
    rows = torch.nn.functional.pad(values.float(), (0, short)).view(-1, BLOCK)
    scale = (rows.abs().amax(1) / MOST).clamp(min=LEAST)
    codes = (rows / scale[:, None]).round().clamp(-MOST, MOST).to(torch.int8)
    return codes.view(-1)[: values.numel()], scale


def pieces(codes: Tensor) -> Iterator[tuple[int, int]]:
    """Flat ranges in which a tensor is decoded: few for a tensor without memory, all of it on a card."""
    count = codes.numel()
    step = max(1, count) if codes.device.type not in ("cpu", "meta") else PIECE
    starts = range(0, count, step)
    if codes.device.type == "meta" or hasattr(codes, "fake_mode"):
        starts = range(0, min(count, step), step)  # the first stands for all
    for start in starts:
        yield start, min(count, start + step)
