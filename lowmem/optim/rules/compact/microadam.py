"""MicroAdam: a window of sparse gradients instead of moments (arXiv 2405.15593).

    a = g + e
    I = the k largest |a| of each block,  V = a[I],  a[I] = 0,  e = 4 bits of what is left
    the window forgets its oldest row and takes (I, V)
    z1 = sum over rows beta1^age V,  z2 = sum over rows beta2^age V^2      (age 0: the newest row)
    m = (1 - beta1) / (1 - beta1^t) z1,  v = (1 - beta2) / (1 - beta2^t) z2
    d = m / (sqrt(v) + eps)

What is not selected is owed: it is held in 4 bits and added to the next
gradient, so nothing is lost, only late. At most window x density of the
elements move in a step. The corrections divide by the true t although the sums
have no more than `window` terms, as published: a coordinate that is selected in
every step moves faster and faster, up to 6.5 times Adam's step.

Blocks have 4096 elements whatever the hardware (the published kernels take
their size from the GPU's shared memory), and so a tensor's last block is padded
with zeros and treated like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.contract import Pointwise
from lowmem.optim.terms.hyper import ChunkHyper, Hyper
from lowmem.optim.terms.state import State

BLOCK = 4096
"""Elements from which the largest are taken; indices fit in 16 bits."""
FARTHEST = 1e38
"""What is accumulated stays below: the range of a bucket must have an fp32 value."""
SMALLEST = 1e-37
"""A positive normal fp32: nothing divided by it is nothing."""


@dataclass(frozen=True)
class MicroAdam(Pointwise):
    """Adam's moments computed anew from the last few sparse gradients.

    Bytes for d elements, b = ceil(d / 4096) blocks, k = ceil(4096 density) entries of each:
    2048 b (error codes) + 4 b 4096 / bucket (their ranges) + 4 window k b (indices and
    values) + 4 (age); 0.9 d with the defaults. A shard of a tensor gives the same
    steps as the whole if it starts on a block.

    Args:
        window: rows of the window, at least 1.
        density: share of a block that is selected, in (0, 1].
        bucket: elements with one 4-bit range; even, divides 4096.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> state = MicroAdam().init(torch.zeros(64, 65))
        >>> sorted(state), tuple(state["index"].shape)
        (['age', 'error.codes', 'error.range', 'index', 'value'], (2, 10, 41))
    """

    window: int = 10
    density: float = 0.01
    bucket: int = BLOCK
    grain: int = BLOCK
    compilable: bool = False  # selecting and scattering do not fuse
    chunk: int = 1 << 18  # its scratch is eight times the chunk: larger ones leave the cache

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"window must be at least 1, got {self.window}")
        if not 0.0 < self.density <= 1.0:
            raise UserError(f"density must be in (0, 1], got {self.density}")
        if self.bucket < 2 or self.bucket % 2 or BLOCK % self.bucket:
            raise UserError(f"bucket must be an even divisor of {BLOCK}, such as 64, got {self.bucket}")

    @property
    def per(self) -> Mapping[str, int]:
        """Everything but the age is cut by blocks."""
        return {"index": BLOCK, "value": BLOCK, "error.codes": BLOCK, "error.range": BLOCK}

    @property
    def kept(self) -> int:
        """Elements selected in a block."""
        return math.ceil(self.density * BLOCK)

    def init(self, x: Tensor) -> State:
        """An empty window, nothing owed, age 0."""
        blocks = -(-x.numel() // BLOCK)
        rows, buckets = (blocks, self.window, self.kept), (blocks, BLOCK // self.bucket, 2)
        return {
            "index": torch.zeros(rows, dtype=torch.int16, device=x.device),
            "value": torch.zeros(rows, dtype=torch.bfloat16, device=x.device),
            "error.codes": torch.zeros(blocks, BLOCK // 2, dtype=torch.uint8, device=x.device),
            "error.range": torch.zeros(buckets, dtype=torch.bfloat16, device=x.device),
            "age": torch.zeros((), dtype=torch.int32, device=x.device),
        }

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """Both betas, (1 - beta) / (1 - beta^t) for each, eps; betas in double precision."""
        betas = hp.vector(*hp.betas)
        corrections = hp.vector(*(1.0 - beta for beta in hp.betas)) / (1.0 - betas ** s["age"])
        return torch.cat((betas, corrections, hp.vector(hp.eps))).float()

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The equations above on one chunk; a gradient that is not finite counts as zero."""
        owed = unpacked(s["error.codes"], s["error.range"])
        a = (g + owed).clamp(-FARTHEST, FARTHEST)
        index = a.abs().topk(self.kept, dim=1, sorted=False).indices
        value = a.gather(1, index).to(torch.bfloat16)
        codes, span = packed(a.scatter(1, index, 0.0), self.bucket)
        slot = ((s["age"] - 1) % self.window).long()
        new = {
            "index": self._taken(s["index"], slot, index.to(torch.int16), hp.ok),
            "value": self._taken(s["value"], slot, value, hp.ok),
            "error.codes": torch.where(hp.ok, codes, s["error.codes"]),
            "error.range": torch.where(hp.ok, span, s["error.range"]),
        }
        return self._direction(new["index"], new["value"], slot, hp.scalars), new

    @staticmethod
    def _taken(rows: Tensor, slot: Tensor, newest: Tensor, ok: Tensor) -> Tensor:
        """The window with its row at `slot` replaced."""
        where = slot.view(1)
        old = rows.index_select(1, where)
        return rows.index_copy(1, where, torch.where(ok, newest.unsqueeze(1), old))

    def _direction(self, index: Tensor, value: Tensor, slot: Tensor, scalars: Tensor) -> Tensor:
        """Scatter the rows, weighted by age, and divide: (blocks, 4096)."""
        beta1, beta2, correction1, correction2, eps = scalars[:5].unbind()
        age = (slot - torch.arange(self.window, device=slot.device)) % self.window
        # squares of values beyond 1e19 have no fp32: each block counts in units of its largest
        unit = value.float().abs().amax((1, 2)).clamp(min=SMALLEST)[:, None]
        scaled = value.float() / unit[:, :, None]
        first = scaled * (correction1 * beta1**age)[:, None]
        second = scaled.square() * (correction2 * beta2**age)[:, None]
        m = torch.zeros(index.shape[0], BLOCK, device=index.device)
        v = torch.zeros_like(m)
        for row in range(self.window):  # no element twice in a row: the sums have one order on any device
            at = index[:, row].long()
            m.scatter_add_(1, at, first[:, row])
            v.scatter_add_(1, at, second[:, row])
        return m.div_(v.sqrt_().add_((eps / unit).clamp(min=SMALLEST)))

    def check_rebase(self, kind: str) -> None:
        """Positions and what is owed belong to one basis: all that can be done is to forget them."""
        if kind != "reset":
            raise UserError(
                f"on_refresh={kind!r} is not defined for a window of gradients; take on_refresh='reset'"
            )


def packed(rest: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """What is owed, in 4 bits: lo = min, u = (max - lo) / 15, code = floor((x - lo) / u + 1/2).

    Args:
        rest: (blocks, 4096) fp32.
        bucket: elements that share lo and max.

    Returns:
        Two codes a byte, the first in the upper half, (blocks, 2048) uint8; and
        (blocks, buckets, 2) bf16 with lo and max.
    """
    values = rest.view(rest.shape[0], -1, bucket)
    span = torch.stack(values.aminmax(dim=2), dim=2).to(torch.bfloat16)
    low, unit = _scale(span)
    # rounded to bf16, lo may lie above the smallest value; and a bucket of equal values has no unit
    steps = torch.where(unit > 0.0, unit, math.inf)
    codes = ((values - low) / steps + 0.5).floor_().clamp_(0.0, 15.0)
    pairs = codes.view(rest.shape[0], -1, 2)
    return (pairs[:, :, 0] * 16.0 + pairs[:, :, 1]).to(torch.uint8), span


def unpacked(codes: Tensor, span: Tensor) -> Tensor:
    """lo + code u, (blocks, 4096) fp32: the inverse of `packed` up to half a unit."""
    low, unit = _scale(span)
    halves = torch.stack((codes >> 4, codes & 15), dim=2)
    values = halves.view(codes.shape[0], span.shape[1], -1)
    return (low + values * unit).view(codes.shape[0], -1)


def _scale(span: Tensor) -> tuple[Tensor, Tensor]:
    low, high = span[:, :, :1].float(), span[:, :, 1:].float()
    return low, (high - low) / 15.0
