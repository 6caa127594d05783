"""Papers transcribed in double precision: rules that divide a matrix by its own size."""

from __future__ import annotations

import torch
from torch import Tensor


class Reference:
    """W after each step; subclasses say what is stepped by."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float) -> None:
        self.w, self.lr, self.weight_decay, self.t = w.double().clone(), lr, weight_decay, 0

    def direction(self, g: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        self.w = (1 - self.lr * self.weight_decay) * self.w - self.lr * self.direction(g.double())
        return self.w.clone()


class SinkGD(Reference):
    """arXiv 2502.06742: the matrix itself is divided, five times."""

    def direction(self, g: Tensor) -> Tensor:
        m, n = g.shape
        for _ in range(5):
            g = g / g.norm(dim=1, keepdim=True) * n**0.5
            g = g / g.norm(dim=0, keepdim=True) * m**0.5
        return 0.05 * g


class SCALE(Reference):
    """arXiv 2506.16659, with the rms of the published code."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, momentum: float, dim: int) -> None:
        super().__init__(w, lr, weight_decay)
        self.momentum, self.dim, self.m = momentum, dim, torch.zeros_like(self.w)

    def direction(self, g: Tensor) -> Tensor:
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        return self.m / self.m.square().mean(self.dim, keepdim=True).sqrt()
