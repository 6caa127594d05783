"""A step inside a subspace, as residuals and bases that follow it see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.formulas import Formula, Product, minus
from lowmem.optim.terms.hyper import Hyper

Commit = Callable[[], None]
"""What is left to do once the weight is written."""


@dataclass(frozen=True)
class Sum:
    """scale a + b."""

    scale: float

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Of row blocks."""
        return (a if self.scale == 1.0 else a * self.scale) + b


@dataclass(frozen=True)
class Split:
    """What went into a step and what came out.

    Args:
        g: the gradient with what was owed, (m, n); lift: x to up(x); pair: the factors of up(N), if any.
        low: R, the projected gradient; step: N, what the inner rule made of it.
        sees: an element of g that is not finite is one in low too, so that ok is False.
        scale: factor of the lifted step; axis: of R that the basis spans, see `Projector.axis`.
        ok: 0-D bool, False where no step is taken; hp: of this step.
    """

    g: Blocks
    lift: Callable[[Tensor], Blocks]
    pair: tuple[Tensor, Tensor] | None
    low: Tensor
    step: Tensor
    sees: bool
    scale: float
    axis: int
    ok: Tensor
    hp: Hyper

    @functools.cached_property
    def rest(self) -> Blocks:
        """G - up(R)."""
        return Formula(minus, (self.g, self.lift(self.low)))

    @functools.cached_property
    def lifted(self) -> Blocks:
        """up(N)."""
        return self.lift(self.step)

    def with_rest(self, absorbed: Blocks) -> Blocks:
        """scale up(N) and the step of the rest; step and low are used up where that saves a product."""
        joined = self._joined(absorbed)
        return Formula(Sum(self.scale), (self.lifted, absorbed)) if joined is None else joined

    def _joined(self, absorbed: Blocks) -> Blocks | None:
        """Of a rest that is multiplied by f, where kernels are compiled: P (scale N - R f) + G f."""
        if not isinstance(absorbed, Formula) or absorbed.f is not torch.mul or absorbed.of != (self.rest,):
            return None
        if self.pair is None or self.hp.passes.leaf(self.g) is None:
            return None
        (a, b), down, across = self.pair, absorbed.down, absorbed.across
        rows = (self.step, *(v[:, None] for v in down))
        self.hp.sweep(_join_, Dense(self.low), rows, across, (self.scale,))
        pair = (a, self.step) if self.axis == 0 else (self.step, b)
        lifted = Product(pair, self.hp.weight.dtype, self.g.shape)
        return Formula(_with, (lifted, self.g), down, across)


def _join_(low: Tensor, step: Tensor, factors: Tensor, scale: float) -> None:
    step.mul_(scale).sub_(low * factors)


def _with(lifted: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    return lifted + g * factors
