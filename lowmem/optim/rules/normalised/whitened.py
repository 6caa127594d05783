"""SWAN: the gradient with rows around their mean, then with equal singular values; no state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import SCRATCH, Rule
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.measured.layerwise import LEAST_SPREAD
from lowmem.optim.rules.normalised.muon import Product, gram
from lowmem.optim.rules.normalised.rows import inverse, row_squares, unit
from lowmem.optim.rules.normalised.schulz import left_, polynomial
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

MOST = 16
"""Iterations in which rounding noise stays below a hundredth of a step."""


@dataclass(frozen=True)
class SWAN(Rule):
    """The gradient with rows of mean 0 and rms 1, then with equal singular values (arXiv 2412.13148).

        X = (G - row means) / row deviations
        D = (X X')^(-1/2) X |X| / |(X X')^(-1/2) X|,  by Newton and Schulz

    D has rms 1. A tall X has rank n - 1, for its rows have mean 0: what is made equal are the singular
    values that are not 0. Those below 1 / 1.5^iterations of the norm of X X' (its root) stay smaller. Rows
    of equal elements stand still. Holds 0 bytes for an (m, n) weight; the workspace is 12 s^2 bytes beside
    that of every step, s the short side.

    Args:
        iterations: of Newton and Schulz, from 1 to 16: singular values that are rounding noise in fp32, of a
            tall X and of every one of small rank, grow 1.5 times in each, and would be equal to others by 20.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> SWAN().init(torch.zeros(3, 5))
        {}
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.iterations <= MOST:
            raise UserError(
                f"iterations must be from 1 to {MOST}, got {self.iterations}; more make full steps of "
                "rounding noise, and 10 are usual"
            )

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def scratch(self, shape: tuple[int, int]) -> int:
        """Three matrices of the short side."""
        return SCRATCH + 12 * min(shape) ** 2

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find what X is multiplied by; the product is left to the write."""
        x, ok = unit(g, hp)
        mean, sizes = torch.zeros(2, g.shape[0], device=g.device).unbind()
        hp.sweep(_note_spread, x, (mean, sizes))
        x = hp.seen(Formula(_standardised, (x,), (mean, sizes)))
        a = gram(x)
        squares, norm = a.diagonal().sum(), torch.linalg.matrix_norm(a).sqrt().clamp(min=TINY**0.5)
        t, p, last = polynomial(a, norm, [(1.5, -0.5, 0.0)] * self.iterations, x.panel)
        left_(p, last, x.panel)
        equal = torch.dot(last.view(-1), p.view(-1))  # the trace of P A P, the squared norm of T X
        t.mul_(torch.where(equal > 0.0, (squares / equal).sqrt(), 0.0))
        return Direction(Product(t, x), ok=ok)


def _note_spread(rows: Tensor, mean: Tensor, sizes: Tensor) -> None:
    """The mean of rows, and what their deviation is divided by; of equal elements, 0."""
    mean.copy_(rows.mean(1))
    squares = row_squares(rows - mean[:, None])
    spread = squares > LEAST_SPREAD * row_squares(rows)
    sizes.copy_(torch.where(spread, inverse(squares, rows.shape[1]), 0.0))


def _standardised(rows: Tensor, mean: Tensor, sizes: Tensor) -> Tensor:
    """Rows less their mean over their deviation."""
    return (rows - mean) * sizes
