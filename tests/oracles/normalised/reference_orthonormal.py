"""Papers transcribed in double precision: rules that make singular values equal, by an SVD where they may."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.normalised.reference_normalised import Reference


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


class AdaMuon(Reference):
    """arXiv 2507.11005, with the sign of the paper or as published code has it; betas2 0.999, eps 1e-8."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, sign: bool) -> None:
        super().__init__(w, lr, weight_decay)
        self.sign, self.m, self.v = sign, torch.zeros_like(self.w), torch.zeros_like(self.w)

    def direction(self, g: Tensor) -> Tensor:
        self.m = 0.95 * self.m + 0.05 * g
        u = 0.05 * g + 0.95 * self.m
        o = newton_schulz(u.sign() if self.sign else u)
        self.v = 0.999 * self.v + 0.001 * o**2
        n = o / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return 0.2 * n / n.norm() * n.numel() ** 0.5


class AuON(Reference):
    """arXiv 2509.24320, its text or its published code."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, released: bool) -> None:
        super().__init__(w, lr, weight_decay)
        self.released, self.m = released, torch.zeros_like(self.w)

    def direction(self, g: Tensor) -> Tensor:
        self.m = 0.95 * self.m + 0.05 * g
        u = 0.05 * g + 0.95 * self.m
        x = u / u.norm()
        d = u if self.released else x * max(1.0, g.shape[0] / g.shape[1]) ** 0.5
        return d / (1.5 * x).cosh().square().mean().sqrt()


class Dion(Reference):
    """arXiv 2504.05295, Algorithm 1, from a given Q (n, r)."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, q: Tensor) -> None:
        super().__init__(w, lr, weight_decay)
        self.m, self.q = torch.zeros_like(self.w), q.double()

    def direction(self, g: Tensor) -> Tensor:
        self.m = self.m + g
        p = torch.linalg.qr(self.m @ self.q).Q
        r = self.m.mT @ p
        self.m = self.m - 0.05 * p @ r.mT
        self.q = r / (r.norm(dim=0) + 1e-8)
        return (g.shape[0] / g.shape[1]) ** 0.5 * p @ self.q.mT


class SUMO(Reference):
    """arXiv 2505.24749 for wide matrices: the moment turns with the basis; an SVD makes it orthogonal."""

    def __init__(self, w: Tensor, lr: float, weight_decay: float, rank: int) -> None:
        super().__init__(w, lr, weight_decay)
        self.p = torch.zeros(w.shape[0], rank).double()
        self.m = torch.zeros(rank, w.shape[1]).double()

    def refresh(self, g: Tensor) -> None:
        new = torch.linalg.svd(g.double()).U[:, : self.p.shape[1]]
        self.m, self.p = new.mT @ self.p @ self.m, new

    def direction(self, g: Tensor) -> Tensor:
        self.m = 0.95 * self.m + 0.05 * self.p.mT @ g
        return 0.2 * max(self.m.shape) ** 0.5 * self.p @ polar(self.m)
