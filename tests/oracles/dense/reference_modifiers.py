"""Modifiers of AdamW, each written out as its paper has it, in the dtype of the given weight (float64).

    cautious   2411.16085   u = u o 1[u o g > 0] / max(mean of the mask, 1e-3)
    grams      2412.17107   u = sign(g) o |u|
    limiter    2410.01623   if |u_t| > gamma |u_(t-1)|:  u_t = u_t gamma |u_(t-1)| / |u_t|
    spam       2501.06842   where g^2 > theta v:  g = sign(g) sqrt(theta v)
    lamb       1904.00962   u = u |w| / |u|
    alpha      2501.18094   u = u o 1[m o g > 0] |u| / |masked u|, m before the step; all of it at first

u is AdamW's bias-corrected step for lr = 1. Loops over elements, where the paper speaks of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.oracles.dense.reference_adamw import AdamW

After = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gradient, step, weight) to the step that is taken."""


def cautious(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    out, agreeing = torch.zeros_like(u), 0
    for i in range(u.numel()):
        if float(u.view(-1)[i]) * float(g.view(-1)[i]) > 0:
            out.view(-1)[i] = u.view(-1)[i]
            agreeing += 1
    return out / max(agreeing / u.numel(), 1e-3)


def keeping_length(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """The mask of cautious, and the step as long as without it."""
    masked = cautious(g, u, w)
    return masked * (u.norm() / masked.norm())


def grams(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(u)
    for i in range(u.numel()):
        x = float(g.view(-1)[i])
        out.view(-1)[i] = ((x > 0) - (x < 0)) * abs(float(u.view(-1)[i]))
    return out


def lamb(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    return u * (w.norm() / u.norm()) if float(w.norm()) and float(u.norm()) else u


class Alpha:
    """The momentum before each step is kept here, an average of the gradients that it is shown."""

    def __init__(self, beta1: float) -> None:
        self.beta1, self.m = beta1, torch.zeros(())

    def __call__(self, g: Tensor, u: Tensor, w: Tensor) -> Tensor:
        m = self.m.expand_as(g)
        mask = torch.tensor(
            [float(a) * float(b) > 0 for a, b in zip(m.reshape(-1), g.reshape(-1), strict=True)]
        )
        masked = u * mask.view_as(u) if bool(m.any()) else u
        self.m = self.beta1 * m + (1 - self.beta1) * g
        return masked * (u.norm() / masked.norm())


class Limiter:
    def __init__(self, gamma: float = 1.01) -> None:
        self.gamma, self.before = gamma, 0.0
        self.limited = 0

    def __call__(self, g: Tensor, u: Tensor, w: Tensor) -> Tensor:
        norm = math.sqrt(sum(float(x) ** 2 for x in u.view(-1)))
        if self.before and norm > self.gamma * self.before:
            u = u * (self.gamma * self.before / norm)
            norm = self.gamma * self.before
            self.limited += 1
        self.before = norm
        return u


def clipped(g: Tensor, v: Tensor, theta: float) -> Tensor:
    """SPAM's spike-aware clipping; an element without history is let through."""
    out = g.clone()
    for i in range(g.numel()):
        x, square = float(g.view(-1)[i]), float(v.view(-1)[i])
        if square > 0 and x * x > theta * square:
            out.view(-1)[i] = math.copysign(math.sqrt(theta * square), x)
    return out


def follow(
    start: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    theta: float = 0.0,
    guard: int = 20,
    after: Sequence[After] = (),
) -> list[Tensor]:
    """The weights after each step: spikes clipped after `guard` steps, if theta, and `after` in order."""
    adam, weights = AdamW(start.double(), lr, betas, eps), []
    w = start.double().clone()
    for t, gradient in enumerate(grads, 1):
        g = gradient.double()
        if theta and t > guard:
            g = clipped(g, adam.v, theta)
        u = adam.direction(g)
        for modifier in after:
            u = modifier(g, u, w)
        w = w * (1 - lr * weight_decay) - lr * u
        weights.append(w)
    return weights
