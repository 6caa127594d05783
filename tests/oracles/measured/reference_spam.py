"""SPAM and Stable-SPAM in double precision, as their papers have them (arXiv 2501.06842, 2502.17055).

Steps are counted from 1; a reset falls on step D + 1, 2 D + 1, ... for an interval of D steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.dense.reference_adamw import AdamW


@dataclass
class SPAM(AdamW):
    """Spike-aware clipping, momentum reset and the cosine after it."""

    threshold: float = 5000.0
    guard: int = 20
    gap: int = 500
    warmup: int = 150
    steps: int = 0
    since: float = math.inf

    def step(self, g: Tensor) -> Tensor:
        self.steps, self.since = self.steps + 1, self.since + 1
        g = g.to(self.w)
        if self.steps > 1 and (self.steps - 1) % self.gap == 0:
            self.reset()
            self.since = 0
        if self.t >= self.guard:
            most = (self.threshold * self.v).sqrt()
            g = torch.where((g.abs() > most) & (self.v > 0), g.sign() * most, g)
        phi = 1.0
        if self.since < self.warmup:
            phi = 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * self.since / (self.warmup + 1)))
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * phi * self.direction(g)
        return self.w


@dataclass
class StableSPAM(AdamW):
    """AdaClip, AdaGN and MoRet around Adam; the averages of the first two outlive the third."""

    gamma1: float = 0.7
    gamma2: float = 0.9
    theta: float = 0.999
    gap: int = 1000
    steps: int = 0
    x: float = 0.0
    a: float = 0.0
    b: float = 0.0

    def step(self, g: Tensor) -> Tensor:
        self.steps += 1
        g, k = g.to(self.w), self.steps
        if k > 1 and (k - 1) % self.gap == 0:
            self.reset()
        largest = float(g.abs().max())
        self.x = self.theta * self.x + (1 - self.theta) * largest
        limit = self.x / (1 - self.theta**k)
        g = torch.where(g.abs() > limit, g * limit / largest, g)
        norm = float(g.norm())
        self.a = self.gamma1 * self.a + (1 - self.gamma1) * norm
        self.b = self.gamma2 * self.b + (1 - self.gamma2) * norm**2
        mean, root = self.a / (1 - self.gamma1**k), math.sqrt(self.b / (1 - self.gamma2**k))
        g = g / norm * mean / (root + self.eps)
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * self.direction(g)
        return self.w
