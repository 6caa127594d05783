"""Companded 8-bit moments (FlashOptim, arXiv 2602.23349), written out.

Runs of 32 elements with one 16-bit scale, the absolute maximum: fp16 in the paper, bf16 in lowmem,
whose moments may be smaller than fp16's range.
    signed    y = x / scale,  z = 2 y / (1 + |y|),  code = round(127 z);   y = z / (2 - |z|)
    unsigned  y = sqrt(x) / scale of sqrt(x),       code = round(255 y);   x = (scale y)^2
In lowmem an unsigned x > 0 has code 1 at least: in the paper's format a second moment may become zero
beside a first one that does not, and the next step is then m / eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.dense.reference_int8 import blocks_of

GROUP = 32


def encode(x: Tensor, signed: bool, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """Codes as float (so that neighbours can be compared) and the scales."""
    rows = blocks_of(x.float() if signed else x.float().sqrt(), GROUP)
    scale = rows.abs().amax(1).to(dtype)
    y = torch.where(scale[:, None] > 0, rows / scale[:, None].float(), 0.0)
    codes = (127 * 2 * y / (1 + y.abs())) if signed else 255 * y
    codes = codes.round().clamp(-127 if signed else 0, 127 if signed else 255)
    codes = codes if signed else torch.where(rows > 0, codes.clamp(min=1), codes)
    return codes.view(-1)[: x.numel()].view(x.shape), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    z = blocks_of(codes, GROUP) / (127 if signed else 255)
    rows = scale[:, None].float() * (z / (2 - z.abs()) if signed else z)
    out = rows if signed else rows.square()
    return out.view(-1)[: codes.numel()].view(codes.shape)


def worst_error(scale: Tensor, signed: bool) -> Tensor:
    """Largest distance of a decoded value from the truth, by group.

    Signed: half a code is 1/254 in z, and dy/dz <= 2 at |z| = 1. Unsigned: half a code is 1/510 in the
    root r <= scale, so the square is off by at most 2 scale^2/510 + scale^2/510^2. The scale itself is
    rounded: the largest element of a group may lie outside it by that much and is cut off.
    """
    s = scale.float()
    slack = torch.finfo(scale.dtype).eps
    return s * (2 / 254 + slack) if signed else s.square() * (2 / 510 + 1 / 510**2 + 2 * slack)
