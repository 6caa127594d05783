"""MicroAdam, written out (arXiv 2405.15593, algorithm 1), with blocks of 4096.

    a = g + decode(e)
    in each block: I = the k largest |a|, V = a[I] in bf16, a[I] = 0,   k = ceil(density 4096)
    in each bucket: lo = min a, hi = max a (bf16), u = (hi - lo) / 15, e = floor((a - lo) / u + 1/2)
    the window forgets its oldest row and takes (I, V)
    z1 = sum over rows b1^age V, z2 = sum over rows b2^age V^2    (age 0: the newest row)
    m = (1 - b1) / (1 - b1^t) z1,  v = (1 - b2) / (1 - b2^t) z2
    W <- (1 - lr wd) W - lr m / (sqrt(v) + eps)
Guards: u = 0 encodes as 0, codes stay in 0..15. A tensor is padded with zeros to whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracles.dense.reference_int8 import blocks_of

BLOCK = 4096


@dataclass
class MicroAdam:
    """One tensor under MicroAdam; `w` is the weight, `step(g)` moves it."""

    w: Tensor
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    window: int = 10
    density: float = 0.01
    bucket: int = BLOCK
    exact_feedback: bool = False
    value_dtype: torch.dtype = torch.bfloat16
    t: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()
        self.rows: list[tuple[Tensor, Tensor]] = []  # newest first: indices and values, each (blocks, k)
        self.k = math.ceil(self.density * BLOCK)
        blank = torch.zeros(-(-self.w.numel() // BLOCK), BLOCK)
        self.error = blank
        self.unit = blank.view(-1, self.bucket)[:, :1]

    def feed_back(self, a: Tensor) -> None:
        rows = a.view(-1, self.bucket)
        lo = rows.amin(1, keepdim=True).bfloat16().float()
        hi = rows.amax(1, keepdim=True).bfloat16().float()
        self.unit = (hi - lo) / 15
        codes = torch.where(self.unit > 0, ((rows - lo) / self.unit + 0.5).floor(), 0.0).clamp(0, 15)
        self.error = a if self.exact_feedback else (lo + codes * self.unit).view_as(a)

    def scatter(self, row: tuple[Tensor, Tensor], power: int) -> Tensor:
        index, value = row
        return torch.zeros_like(self.error).scatter(1, index, value.float() ** power)

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        self.a = blocks_of(g.float(), BLOCK) + self.error
        index = self.a.abs().topk(self.k, dim=1).indices
        self.rows.insert(0, (index, self.a.gather(1, index).to(self.value_dtype)))
        del self.rows[self.window :]
        self.feed_back(self.a.scatter(1, index, 0.0))
        b1, b2 = self.betas
        z1 = sum(b1**age * self.scatter(row, 1) for age, row in enumerate(self.rows))
        z2 = sum(b2**age * self.scatter(row, 2) for age, row in enumerate(self.rows))
        m = (1 - b1) / (1 - b1**self.t) * z1
        v = (1 - b2) / (1 - b2**self.t) * z2
        move = (m / (v.sqrt() + self.eps)).view(-1)[: g.numel()].view(g.shape)
        self.w = (self.w.float() * (1 - self.lr * self.weight_decay) - self.lr * move).to(self.w.dtype)
        return self.w

    def support(self) -> Tensor:
        """True where one of the rows in the window has an entry."""
        seen = torch.zeros_like(self.error, dtype=torch.bool)
        for index, _ in self.rows:
            seen.scatter_(1, index, True)
        return seen.view(-1)[: self.w.numel()].view(self.w.shape)


def stationary_gain(t: int, window: int, betas: tuple[float, float]) -> float:
    """m / sqrt(v) of a coordinate that gets the gradient 1 in each of t steps: it grows with t.

    The window cuts the long sum of v more than that of m.
    """
    b1, b2 = betas
    rows = min(t, window)
    m = (1 - b1**rows) / (1 - b1**t)
    v = (1 - b2**rows) / (1 - b2**t)
    return m / math.sqrt(v)
