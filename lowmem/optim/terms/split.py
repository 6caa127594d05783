"""A step inside a subspace, as residuals and bases that follow it see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.formulas import Formula
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
        g: the gradient with what was owed, (m, n); rest: G - up(R); lifted: up(N); pair: its factors, if any.
        low: R, the projected gradient; step: N, what the inner rule made of it.
        sees: an element of g that is not finite is one in low too, so that ok is False.
        scale: factor of the lifted step; axis: of R that the basis spans, see `Projector.axis`.
        ok: 0-D bool, False where no step is taken; hp: of this step.
    """

    g: Blocks
    rest: Blocks
    lifted: Blocks
    pair: tuple[Tensor, Tensor] | None
    low: Tensor
    step: Tensor
    sees: bool
    scale: float
    axis: int
    ok: Tensor
    hp: Hyper

    def with_rest(self, absorbed: Blocks) -> Blocks:
        """scale up(N) and the step of the rest, row block by row block."""
        return Formula(Sum(self.scale), (self.lifted, absorbed))
