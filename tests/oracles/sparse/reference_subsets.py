"""Subset norms and subspace momentum (arXiv 2411.07120), written out in double precision.

Every class is one weight's optimizer: `step` gives the weight after it. Nothing of lowmem is used.
"""

from __future__ import annotations

import torch
from torch import Tensor


def members(shape: tuple[int, int], size: int) -> list[list[tuple[int, int]]]:
    """The elements of each subset: the long side's rows or columns, or `size` of them in a row."""
    m, n = shape
    every = [(i, j) for i in range(m) for j in range(n)]
    if size:
        return [every[a : a + size] for a in range(0, len(every), size)]
    if m >= n:
        return [[(i, j) for j in range(n)] for i in range(m)]
    return [[(i, j) for i in range(m)] for j in range(n)]


class Divisor:
    """sqrt of the averaged sum of squares of each subset, for all of its elements, without bias."""

    def __init__(self, shape: tuple[int, int], size: int, beta2: float, eps: float) -> None:
        self.members, self.beta2, self.eps = members(shape, size), beta2, eps
        self.v, self.t = [0.0] * len(self.members), 0

    def of(self, g: Tensor) -> Tensor:
        self.t += 1
        out = torch.empty_like(g)
        for k, some in enumerate(self.members):
            total = sum(float(g[at]) ** 2 for at in some)
            self.v[k] = self.beta2 * self.v[k] + (1 - self.beta2) * total
            for at in some:
                out[at] = (self.v[k] / (1 - self.beta2**self.t)) ** 0.5 + self.eps
        return out


class AdamSN:
    """A full momentum over subset norms."""

    def __init__(
        self, w: Tensor, size: int, lr: float, betas: tuple[float, float], eps: float, wd: float = 0.0
    ) -> None:
        self.w, self.lr, self.beta1, self.wd = w, lr, betas[0], wd
        self.m, self.t = torch.zeros_like(w), 0
        self.divisor = Divisor((w.shape[0], w.shape[1]), size, betas[1], eps)

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.w = self.w * (1 - self.lr * self.wd)
        self.w = self.w - self.lr * self.m / (1 - self.beta1**self.t) / self.divisor.of(g)
        return self.w


class AdamSNSM:
    """Momentum in a basis that is given at every step, the gradient beside it, over subset norms.

    `released` does as the published code at a refresh: the old momentum is used once more, in the new basis,
    and what is kept is zero.
    """

    def __init__(
        self, w: Tensor, lr: float, betas: tuple[float, float], eps: float, *, released: bool = False
    ) -> None:
        self.w, self.lr, self.beta1, self.released = w, lr, betas[0], released
        self.divisor = Divisor((w.shape[0], w.shape[1]), 0, betas[1], eps)
        self.m, self.t = torch.zeros(()), 0

    def step(self, g: Tensor, p: Tensor, fresh: bool) -> Tensor:
        """On the left: p is (m, r)."""
        self.t += 1
        low = p.mT @ g
        if self.t == 1 or (fresh and not self.released):
            self.m = torch.zeros_like(low)
        self.m = self.beta1 * self.m + (1 - self.beta1) * low
        numerator = p @ self.m + (g - p @ low)
        self.w = self.w - self.lr * numerator / (1 - self.beta1**self.t) / self.divisor.of(g)
        if fresh and self.released:
            self.m = torch.zeros_like(low)
        return self.w
