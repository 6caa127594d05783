"""Modifiers that compare the signs of step, gradient and momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.modifiers.modifier import NONE, Modifier
from lowmem.optim.terms.state import State

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

    def shape(self, g: Tensor, d: Tensor, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """The masked step."""
        return torch.where(_agrees(g, d), d, 0.0)

    def measure(
        self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE
    ) -> tuple[Tensor, ...]:
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

    def shape(self, g: Tensor, d: Tensor, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """The sign of the gradient, on the length of the step."""
        return g.sign() * d.abs()


@dataclass(frozen=True)
class AlphaMask(Modifier):
    """Leave out what goes against the momentum so far (after AlphaAdam, arXiv 2501.18094).

        mask = 1[m g > 0 or m = 0],   d <- alpha mask d,   alpha = |d| / |mask d|

    m is the momentum before this step: at first there is none to be judged by. The paper adapts the
    strength alpha to the mask; here it is what keeps the length of the step. Holds 16 bytes for the sums.

    Example:
        >>> momentum = {"exp_avg": torch.tensor([1.0, -1.0, 0.0])}
        >>> AlphaMask().shape(torch.ones(3), torch.full((3,), 0.5), momentum).tolist()
        [0.5, 0.0, 0.5]
    """

    needs: ClassVar[tuple[str, ...]] = ("exp_avg",)

    @property
    def sums(self) -> tuple[int, ...]:
        """Squares of the step with mask, and without."""
        return 2, 2

    def shape(self, g: Tensor, d: Tensor, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """The masked step."""
        return torch.where(_goes_on(g, moments["exp_avg"]), d, 0.0)

    def measure(
        self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE
    ) -> tuple[Tensor, ...]:
        """In double precision, where no square overflows."""
        square = d.double().square()
        return torch.where(_goes_on(g, moments["exp_avg"]), square, 0.0), square

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """What makes up for the mask."""
        kept, whole = sums
        return torch.where(kept > 0.0, (whole / kept).sqrt(), 1.0), {}


def _goes_on(g: Tensor, m: Tensor) -> Tensor:
    return _agrees(g, m) | (m == 0.0)
