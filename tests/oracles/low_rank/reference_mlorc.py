"""MLorc (arXiv 2506.01897), written out in double precision with exact truncated decompositions.

`step(g)` gives the weight after it. Nothing of lowmem is used.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def repaired(v: Tensor) -> Tensor:
    """Negative entries become the mean of their magnitudes."""
    below = v < 0
    return torch.where(below, -v[below].mean(), v) if below.any() else v


class MLorc:
    """`released` takes the epsilon and the order of decay of the published code."""

    def __init__(
        self, w: Tensor, rank: int, lr: float, betas: tuple[float, float], eps: float, wd: float,
        *, released: bool = False,
    ) -> None:  # fmt: skip
        self.w, self.rank, self.lr, self.betas, self.eps, self.wd = w, rank, lr, betas, eps, wd
        self.released, self.t = released, 0
        self.m, self.v = torch.zeros_like(w), torch.zeros_like(w)

    def step(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        m = b1 * self.m + (1 - b1) * g
        v = b2 * repaired(self.v) + (1 - b2) * g * g
        self.m, self.v = truncated(m, self.rank), truncated(v, self.rank)
        root = (1 - b2**self.t) ** 0.5
        eps = self.eps / root if self.released else self.eps
        step = self.lr * m / (1 - b1**self.t) / (v.sqrt() / root + eps)
        decay = 1 - self.lr * self.wd
        self.w = (self.w - step) * decay if self.released else self.w * decay - step
        return self.w
