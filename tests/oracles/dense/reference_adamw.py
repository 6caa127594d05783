"""AdamW, written out (arXiv 1711.05101): the truth the plain rule is held to.

    w <- (1 - lr wd) w
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Everything is computed in the dtype of the given weight (float64 in most tests).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AdamW:
    """One tensor under AdamW; `w` is the weight, `step(g)` moves it."""

    w: Tensor
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    t: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()
        self.reset()

    def reset(self) -> None:
        """Forget the moments and start the bias correction afresh."""
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), 0

    def direction(self, g: Tensor) -> Tensor:
        """Move the moments by one gradient; return the bias-corrected step for lr = 1."""
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        return (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)

    def step(self, g: Tensor) -> Tensor:
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * self.direction(g.to(self.w))
        return self.w
