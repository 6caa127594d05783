"""LDAdam (arXiv 2410.16103) and Lotus (2602.01233), written out in double precision, on the left.

Nothing of lowmem is used.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LDAdam:
    """Moments follow a basis that moves at every step; what is lost is added to the next gradient."""

    def __init__(
        self, w: Tensor, lr: float, betas: tuple[float, float], eps: float, rho: float, wd: float = 0.0
    ) -> None:
        self.w, self.lr, self.betas, self.eps, self.rho, self.wd = w, lr, betas, eps, rho, wd
        self.p: Tensor | None = None
        self.e, self.t = torch.zeros_like(w), 0

    def step(self, g: Tensor, first: Tensor) -> Tensor:
        """`first` is the basis of the first step, (m, r)."""
        b1, b2 = self.betas
        a = g + self.e
        self.t += 1
        lost = torch.zeros_like(a)
        if self.p is None:
            self.p = first
            self.m = self.v = torch.zeros_like(first.mT @ a)
        else:
            old, t = self.p, self.t - 1
            m, v = self.m / (1 - b1**t), self.v / (1 - b2**t)
            b = self.rho * old @ m + (1 - self.rho) * a
            q, r = torch.linalg.qr(b @ b.mT @ old)
            self.p = q * r.diagonal().sign()
            c = self.p.mT @ old
            v = ((c * c) @ (v - m * m) + (c @ m) ** 2).abs()
            lost = old @ self.m - self.p @ (c @ self.m)
            self.m, self.v = c @ self.m, (1 - b2**t) * v
        low = self.p.mT @ a
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low * low
        d = self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * self.p @ d
        self.e = a - self.p @ low + b1 / (1 - b1) * lost
        return self.w


def efficiency(p: Tensor, gradients: list[Tensor]) -> float:
    """The share of the way of unit gradients that lies in a subspace."""
    gone = torch.zeros_like(gradients[0])
    for g in gradients:
        gone = gone + g / g.norm()
    return float((p.mT @ gone).norm() / gone.norm())
