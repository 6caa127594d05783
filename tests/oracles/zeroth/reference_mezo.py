"""MeZO, written out (arXiv 2305.17333): two losses and one direction instead of a gradient.

    c = (L(w + eps z) - L(w - eps z)) / (2 eps),     w <- (1 - lr wd) w - lr c z
E[c z] is the gradient: exactly on a quadratic, whatever eps. With a standard normal z the variance
of the estimate's entry i is |g|^2 + g_i^2 (Gaussian) or |g|^2 - g_i^2 (signs) on a linear loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratic:
    """L(w) = w^T A w / 2 + b^T w, all in float64."""

    a: Tensor
    b: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        w = w.reshape(-1).to(self.a)
        return 0.5 * w @ self.a @ w + self.b @ w

    def gradient(self, w: Tensor) -> Tensor:
        return self.a @ w.reshape(-1).to(self.a) + self.b


def slope(loss: Callable[[Tensor], Tensor], w: Tensor, z: Tensor, eps: float) -> float:
    """The two-sided difference quotient along z."""
    return float((loss(w + eps * z) - loss(w - eps * z)) / (2 * eps))


def step(w: Tensor, c: float, z: Tensor, lr: float, weight_decay: float = 0.0) -> Tensor:
    return w * (1 - lr * weight_decay) - lr * c * z


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first dimension."""
    return samples.std(0) / samples.shape[0] ** 0.5


def quadratic(size: int, seed: int = 0) -> Quadratic:
    """A symmetric positive problem whose gradient is not small anywhere near 0."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    return Quadratic(root @ root.mT, torch.randn(size, generator=g, dtype=torch.float64))
