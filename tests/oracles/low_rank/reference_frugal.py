"""FRUGAL, written out (arXiv 2411.07837, algorithm 1): Adam on a part, sign of the rest.

    W <- (1 - lr wd) W
    active part:   W <- W - lr up(Adam(down(G)))
    the rest:      W <- W - lr * residual_scale * f(G - up(down(G))),  f = sign or identity
At a refresh the active part is chosen anew and the moments restart from zero, bias
correction included. The choice itself is random, so a test hands it over: a mask over
the entries (columns, randk, whole tensors) or an orthonormal basis of the short side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.dense.reference_adamw import AdamW


@dataclass
class Frugal:
    """One tensor under FRUGAL; `refresh(mask or basis)` opens a window, `step(g)` moves `w`."""

    w: Tensor
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    residual: str = "sign"
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()

    def refresh(self, mask: Tensor | None = None, basis: Tensor | None = None) -> None:
        self.mask, self.basis = mask, basis
        self.inner: AdamW | None = None

    def down(self, g: Tensor) -> Tensor:
        if self.basis is None:
            return torch.where(self.mask, g, 0.0)
        return self.basis.mT @ g if g.shape[0] < g.shape[1] else g @ self.basis

    def up(self, low: Tensor) -> Tensor:
        if self.basis is None:
            return torch.where(self.mask, low, 0.0)
        return self.basis @ low if self.w.shape[0] < self.w.shape[1] else low @ self.basis.mT

    def rest(self, g: Tensor) -> Tensor:
        if self.basis is None:
            rest = torch.where(self.mask, 0.0, g)
        elif self.basis.shape[1] == min(g.shape):
            rest = torch.zeros_like(g)  # nothing is left but rounding noise: its sign is no direction
        else:
            rest = g - self.up(self.down(g))
        return rest.sign() if self.residual == "sign" else rest

    def step(self, g: Tensor) -> Tensor:
        g = g.to(self.w)
        low = self.down(g)
        if self.inner is None:
            self.inner = AdamW(torch.zeros_like(low), betas=self.betas, eps=self.eps)
        move = self.up(self.inner.direction(low)) + self.residual_scale * self.rest(g)
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * move
        return self.w
