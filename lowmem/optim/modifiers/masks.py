"""Modifiers that compare the signs of step and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.state import State

RESCALES = ("mean", "norm")
LEAST = 1e-3
"""The smallest share of agreeing elements that is made up for."""


@dataclass(frozen=True)
class Cautious(Modifier):
    """Leave out what goes against the gradient (arXiv 2411.16085).

        mask = 1[d g > 0],   d <- f mask d

    mean: f = 1 / max(mean of mask, 1e-3), the mean over elements with a gradient: rows of an embedding
    that no token touches say nothing. norm: f = |d| / |mask d|, which keeps the length of the step.
    Where all agree, and where none does, f = 1.

    Holds 16 bytes for the sums.

    Args:
        rescale: mean or norm.

    Raises:
        UserError: an unknown word.

    Example:
        >>> Cautious().shape(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])).tolist()
        [0.5, 0.0]
    """

    rescale: str = "mean"

    def __post_init__(self) -> None:
        if self.rescale not in RESCALES:
            raise UserError(f"unknown rescale {self.rescale!r}; {nearest(self.rescale, RESCALES)}")

    @property
    def sums(self) -> tuple[int, ...]:
        """Elements that agree and those with a gradient, or squares of the step with and without mask."""
        return (0, 0) if self.rescale == "mean" else (2, 2)

    def shape(self, g: Tensor, d: Tensor) -> Tensor:
        """The masked step."""
        return torch.where(_agrees(g, d), d, 0.0)

    def measure(self, g: Tensor, d: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
        """With the mask, and without."""
        each = torch.where(g != 0.0, 1.0, 0.0) if self.rescale == "mean" else d.double().square()
        return torch.where(_agrees(g, d), each, 0.0), each

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """What makes up for the mask."""
        kept, whole = sums
        if self.rescale == "norm":
            return torch.where(kept > 0.0, (whole / kept).sqrt(), 1.0), {}
        return torch.where(kept > 0.0, (whole / kept).clamp(max=1.0 / LEAST), 1.0), {}


def _agrees(g: Tensor, d: Tensor) -> Tensor:
    """By signs: the product of two small numbers may be 0."""
    return g.sign() * d.sign() > 0.0


@dataclass(frozen=True)
class Grams(Modifier):
    """Length from the step, sign from the gradient (arXiv 2412.17107): d <- sign(g) |d|. Holds nothing.

    Example:
        >>> Grams().shape(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-0.5, -0.5, 0.5])).tolist()
        [0.5, -0.5, 0.0]
    """

    def shape(self, g: Tensor, d: Tensor) -> Tensor:
        """The sign of the gradient, on the length of the step."""
        return g.sign() * d.abs()
