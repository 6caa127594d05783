"""Papers transcribed in double precision: rules that make singular values equal, by an SVD where they may."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.reference_normalised import Reference


def polar(x: Tensor) -> Tensor:
    """The orthogonal factor on the range of x."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag((s > 1e-9 * s.max()).to(x.dtype)) @ vh


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps with Muon's coefficients."""
    tall = x.shape[0] > x.shape[1]
    x = (x.mT if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class SWAN(Reference):
    """arXiv 2412.13148, with the whitened matrix scaled back to the size of what was whitened."""

    def direction(self, g: Tensor) -> Tensor:
        x = (g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True, correction=0)
        d = polar(x)
        return d * x.norm() / d.norm()


class Muon8bit(Reference):
    """arXiv 2509.23106: int8 at equal distances, 2048 flat elements to a scale; Nesterov, rms scale."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(w, lr, weight_decay)
        self.momentum, self.m = momentum, torch.zeros_like(self.w)

    def direction(self, g: Tensor) -> Tensor:
        m = self.momentum * self.m + (1 - self.momentum) * g
        self.m = torch.cat([self.held(block) for block in m.flatten().split(2048)]).view_as(m)
        return 0.2 * max(m.shape) ** 0.5 * newton_schulz((1 - self.momentum) * g + self.momentum * m)

    @staticmethod
    def held(block: Tensor) -> Tensor:
        scale = block.abs().max() / 127
        return (block / scale).round() * scale
