"""Slow transcriptions of papers whose steps go beyond a fixed subspace, in double precision.

Every class is one weight's optimizer: `step(g)` gives the weight after it. Nothing of lowmem is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Adam:
    """The direction of Adam; t may be one number for each column."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps
        self.m: Tensor | None = None
        self.v: Tensor | None = None
        self.t: Tensor = torch.zeros(())

    def direction(self, g: Tensor) -> Tensor:
        if self.m is None or self.v is None:
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
        b1, b2 = self.betas
        self.t = self.t + 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)


class Fira:
    """arXiv 2410.01623: the rest is scaled channel by channel, and may not grow faster than by `limit`."""

    def __init__(self, w: Tensor, adam: Adam, lr: float, alpha: float, limit: float) -> None:
        self.w, self.adam, self.lr, self.alpha, self.limit = w, adam, lr, alpha, limit
        self.before: float | None = None

    def step(self, g: Tensor, p: Tensor, left: bool) -> Tensor:
        """p is the basis, (m, r) on the left and (n, r) on the right."""
        if not left:
            self.w = self.w.mT
            self.w = self.step(g.mT, p, True).mT
            return self.w
        low = p.mT @ g
        n = self.adam.direction(low)
        rest = g - p @ low
        for j in range(g.shape[1]):
            rest[:, j] *= n[:, j].norm() / (low[:, j].norm() + 1e-8)
        rest = self.limited(rest)
        self.w = self.w - self.lr * (self.alpha * (p @ n) + rest)
        return self.w

    def limited(self, x: Tensor) -> Tensor:
        norm = float(x.norm())
        if self.before is not None and norm > self.limit * self.before:
            x = x * (self.limit * self.before / norm)
        self.before = float(x.norm())
        return x


class Apollo(Fira):
    """arXiv 2412.05270: the whole gradient is scaled, and nothing is lifted."""

    def step(self, g: Tensor, p: Tensor, left: bool) -> Tensor:
        if not left:
            self.w = self.w.mT
            self.w = self.step(g.mT, p, True).mT
            return self.w
        low = p.mT @ g
        n = self.adam.direction(low)
        phi = torch.stack([n[:, j].norm() / (low[:, j].norm() + 1e-8) for j in range(g.shape[1])])
        self.w = self.w - self.lr * self.limited(g * phi)
        return self.w


class OnlineSubspace:
    """arXiv 2408.12857: the basis descends on what it misses of each gradient, by autograd."""

    def __init__(
        self, w: Tensor, p: Tensor, adam: Adam, lr: float, rate: float, penalty: float,
        of_basis: Adam | None = None,
    ) -> None:  # fmt: skip
        self.w, self.p, self.adam, self.lr, self.rate, self.penalty = w, p, adam, lr, rate, penalty
        self.of_basis = of_basis

    def step(self, g: Tensor) -> Tensor:
        """On the left."""
        self.w = self.w - self.lr * (self.p @ self.adam.direction(self.p.mT @ g))
        p = self.p.clone().requires_grad_()
        a = g / g.norm()
        missed = (p @ p.mT @ a - a).square().sum()
        skew = (p.mT @ p - torch.eye(p.shape[1], dtype=p.dtype)).square().sum()
        (slope,) = torch.autograd.grad(missed + self.penalty * skew, p)
        step = self.of_basis.direction(slope) if self.of_basis else slope
        self.p = self.p - self.rate * self.lr * step
        return self.w


def cosine(n: int, k: int) -> Tensor:
    """The k-th cosine of the orthonormal DCT-II, entry by entry."""
    values = [math.cos(k * (2 * j + 1) * math.pi / (2 * n)) * math.sqrt(2 / n) for j in range(n)]
    return torch.tensor(values, dtype=torch.float64) * (math.sqrt(0.5) if k == 0 else 1.0)


class DCTAdam:
    """arXiv 2505.17967, on the right, with moments that follow their column and an age for each."""

    def __init__(self, w: Tensor, rank: int, betas: tuple[float, float], eps: float, lr: float) -> None:
        self.w, self.rank, self.betas, self.eps, self.lr = w, rank, betas, eps, lr
        n = w.shape[1]
        self.basis = torch.stack([cosine(n, k) for k in range(n)])
        self.columns: dict[int, tuple[Tensor, Tensor, int]] = {}

    def step(self, g: Tensor, due: bool) -> Tensor:
        s = g @ self.basis.mT
        if due:
            chosen = sorted(s.abs().sum(0).argsort(descending=True)[: self.rank].tolist())
            zero = torch.zeros(g.shape[0], dtype=g.dtype)
            self.columns = {k: self.columns.get(k, (zero, zero, 0)) for k in chosen}
        b1, b2 = self.betas
        for k, (m, v, t) in self.columns.items():
            r = s[:, k]
            m, v, t = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r, t + 1
            self.columns[k] = (m, v, t)
            d = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.eps)
            self.w = self.w - self.lr * torch.outer(d, self.basis[k])
        return self.w


class Muon:
    """arXiv 2502.16982: Newton and Schulz on the momentum itself."""

    def __init__(self, w: Tensor, lr: float, momentum: float, nesterov: bool, wd: float) -> None:
        self.w, self.lr, self.momentum, self.nesterov, self.wd = w, lr, momentum, nesterov, wd
        self.m = torch.zeros_like(w)

    def step(self, g: Tensor) -> Tensor:
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        x = (1 - self.momentum) * g + self.momentum * self.m if self.nesterov else self.m
        tall = x.shape[0] > x.shape[1]
        x = x.mT if tall else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.mT if tall else x
        scale = 0.2 * math.sqrt(max(self.w.shape))
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * scale * x
        return self.w
