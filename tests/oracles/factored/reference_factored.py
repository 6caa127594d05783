"""Papers transcribed in double precision: rules with less than one number for each second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.normalised.reference_normalised import Reference


def factors(x: Tensor) -> Tensor:
    """The rank-one matrix with the row and column sums of x."""
    return torch.outer(x.sum(1), x.sum(0)) / x.sum()


class CAME(Reference):
    """arXiv 2307.02047, Algorithm 2. Averages are linear: they are held in full, and factored when read."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, betas: tuple[float, float, float]) -> None:
        super().__init__(w, lr, weight_decay)
        self.betas = betas
        self.v, self.m, self.s = (torch.zeros_like(self.w) for _ in range(3))

    def direction(self, g: Tensor) -> Tensor:
        b1, b2, b3 = self.betas
        matrix = g.dim() > 1
        self.v = b2 * self.v + (1 - b2) * (g**2 + 1e-30)
        u = g / (factors(self.v) if matrix else self.v).sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        self.m = b1 * self.m + (1 - b1) * u
        if not matrix:
            return self.m
        self.s = b3 * self.s + (1 - b3) * ((u - self.m) ** 2 + 1e-16)
        return self.m / factors(self.s).sqrt()


class SM3(Reference):
    """arXiv 1901.11150, SM3-II with the rows and columns of a matrix as cover."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(w, lr, weight_decay)
        self.momentum, self.m = momentum, torch.zeros_like(self.w)
        self.rows, self.columns = torch.zeros(w.shape[0]).double(), torch.zeros(w.shape[1]).double()

    def direction(self, g: Tensor) -> Tensor:
        nu = torch.minimum(self.rows[:, None], self.columns) + g**2
        self.rows, self.columns = nu.amax(1), nu.amax(0)
        self.m = self.momentum * self.m + (1 - self.momentum) * g / (nu + 1e-30).sqrt()
        return self.m


class AdamMini(Reference):
    """arXiv 2406.16793: one second moment for each of `blocks` equal pieces of the flat weight."""

    def __init__(
        self, w: Tensor, lr: float, weight_decay: float, betas: tuple[float, float], blocks: int
    ) -> None:
        super().__init__(w, lr, weight_decay)
        self.betas, self.blocks = betas, blocks
        self.m, self.v = torch.zeros_like(self.w), torch.zeros(blocks, 1).double()

    def direction(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g.reshape(self.blocks, -1).square().mean(1, keepdim=True)
        root = (self.v / (1 - b2**self.t)).sqrt() + 1e-8
        return (self.m.reshape(self.blocks, -1) / (1 - b1**self.t) / root).view_as(g)


class AdamRankOne(Reference):
    """arXiv 2309.01507: AdamW, whose second moment is rounded to sixteenths of a rank-one scale."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(w, lr, weight_decay)
        self.betas, self.m, self.held = betas, torch.zeros_like(self.w), torch.zeros_like(self.w)

    def direction(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        v = b2 * self.held + (1 - b2) * g**2
        scale = torch.minimum(v.amax(1, keepdim=True), v.amax(0, keepdim=True))
        marks = torch.arange(1, 17).double() / 16
        nearest = (v[..., None] / scale[..., None] - marks).abs().argmin(-1)
        self.held = marks[nearest] * scale
        return self.m / (1 - b1**self.t) / ((v / (1 - b2**self.t)).sqrt() + 1e-8)
