"""Slow transcriptions of papers whose basis moves or is drawn, in double precision, on the left.

SubTrack++ (arXiv 2502.01586), GrassWalk and GrassJump (2510.01878), GoLore (2410.11289).
Nothing of lowmem is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tangent(s: Tensor, g: Tensor) -> Tensor:
    """-dF/dS of F = |G - S A|^2 at the least squares solution A = S'G, for G of length 1."""
    g = g / g.norm()
    a = s.mT @ g
    return 2 * (g - s @ a) @ a.mT


def tracked(s: Tensor, g: Tensor, eta: float) -> Tensor:
    """The geodesic along the best approximation of rank 1 of the descent direction."""
    u, sigma, vh = torch.linalg.svd(tangent(s, g), full_matrices=False)
    first, length, v = u[:, :1], float(sigma[0]), vh[:1].mT
    both = torch.cat([s @ v, first], 1) @ torch.tensor(
        [[math.cos(eta * length)], [math.sin(eta * length)]], dtype=s.dtype
    )
    return both @ v.mT + s @ (torch.eye(s.shape[1], dtype=s.dtype) - v @ v.mT)


def released_tangent_on_the_right(s: Tensor, g: Tensor) -> Tensor:
    """What the code released with SubTrack makes of a tall gradient: rows of a basis held as (r, n)."""
    rows = s.mT
    a = g @ rows.mT
    slope = -2 * a.mT @ (g - a @ rows)
    return (torch.eye(rows.shape[0], dtype=s.dtype) - rows @ rows.mT) @ slope


def geodesic(s: Tensor, x: Tensor, angle: float) -> Tensor:
    """The exponential map of the tangent part of X, its largest angle being `angle`."""
    x = x - s @ (s.mT @ x)
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    a = sigma * angle / sigma[0]
    v = vh.mT
    return s @ v @ torch.diag(a.cos()) @ v.mT + u @ torch.diag(a.sin()) @ v.mT


class AwareAdam:
    """Adam whose moments follow a change of basis, C = S_new' S_old (arXiv 2410.16103)."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps, self.t = betas, eps, 0
        self.m: Tensor | None = None
        self.v: Tensor | None = None

    def change(self, c: Tensor) -> None:
        if self.m is None or self.v is None:
            return
        b1, b2 = self.betas
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        turned = (c * c) @ (v - m * m) + (c @ m) ** 2
        self.m, self.v = c @ self.m, (1 - b2**self.t) * turned.abs()

    def direction(self, r: Tensor) -> Tensor:
        if self.m is None or self.v is None:
            self.m, self.v = torch.zeros_like(r), torch.zeros_like(r)
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r * r
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)


class Recovering:
    """Adam in a basis that is given at every step, its moments follow it, and the rest is scaled back in."""

    def __init__(self, w: Tensor, adam: AwareAdam, lr: float, scale: float, zeta: float | None) -> None:
        self.w, self.adam, self.lr, self.scale, self.zeta = w, adam, lr, scale, zeta
        self.s: Tensor | None = None
        self.before: float | None = None

    def step(self, g: Tensor, s: Tensor) -> Tensor:
        if self.s is not None and not torch.equal(s, self.s):
            self.adam.change(s.mT @ self.s)
        self.s = s
        r = s.mT @ g
        n = self.adam.direction(r)
        step = self.scale * s @ n
        if self.zeta is not None:
            rest = (g - s @ r) * (n.norm(dim=0) / r.norm(dim=0))
            norm = float(rest.norm())
            if self.before is not None and norm > self.zeta * self.before:
                rest = rest * (self.zeta * self.before / norm)
            self.before = float(rest.norm())
            step = step + rest
        self.w = self.w - self.lr * step
        return self.w
