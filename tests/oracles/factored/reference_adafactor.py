"""Adafactor, written out (arXiv 1804.04235), in the modes that transformers offers.

b2_t = 1 - t^decay_rate                        u = g^2 + eps1
r <- b2_t r + (1 - b2_t) mean over columns of u      c <- the same over rows
U = g / sqrt(r c^T / mean(r))                  (vectors keep the full v)
U <- U / max(1, rms(U) / clip_threshold)
rho = relative_step ? min(warmup_init ? 1e-6 t : 1e-2, 1 / sqrt(t)) : lr
alpha = rho * (scale_parameter ? max(eps2, rms(w)) : 1)
M <- beta1 M + (1 - beta1) alpha U  (with beta1)    w <- w - wd alpha w - (M or alpha U)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@dataclass
class Adafactor:
    """One tensor under Adafactor; `w` is the weight, `step(g)` moves it."""

    w: Tensor
    lr: float | None = None
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False
    t: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()
        self.r = torch.zeros_like(self.w.mean(-1)) if self.w.ndim > 1 else None
        self.c = torch.zeros_like(self.w.mean(-2)) if self.w.ndim > 1 else None
        self.v = torch.zeros_like(self.w)
        self.m = torch.zeros_like(self.w)

    def second_moment(self, u: Tensor) -> Tensor:
        b2 = 1 - self.t**self.decay_rate
        if self.w.ndim < 2:
            self.v = b2 * self.v + (1 - b2) * u
            return self.v
        self.r = b2 * self.r + (1 - b2) * u.mean(-1)
        self.c = b2 * self.c + (1 - b2) * u.mean(-2)
        return self.r.unsqueeze(-1) * self.c.unsqueeze(-2) / self.r.mean(-1, keepdim=True).unsqueeze(-1)

    def alpha(self) -> Tensor | float:
        rho = self.lr
        if self.relative_step:
            rho = min(1e-6 * self.t if self.warmup_init else 1e-2, self.t**-0.5)
        assert rho is not None
        return rho * (rms(self.w).clamp(min=self.eps2) if self.scale_parameter else 1.0)

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        g = g.to(self.w)
        u = g / self.second_moment(g * g + self.eps1).sqrt()
        u = u / (rms(u) / self.clip_threshold).clamp(min=1.0)
        alpha = self.alpha()
        u = alpha * u
        if self.beta1 is not None:
            self.m = self.beta1 * self.m + (1 - self.beta1) * u
            u = self.m
        self.w = self.w - self.weight_decay * alpha * self.w - u
        return self.w
