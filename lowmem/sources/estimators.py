"""From values of the loss to slopes along directions.

    two-sided    c = (l+ - l-) / (2 eps)                     no bias on a quadratic
    one-sided    c = (l+ - l0) / eps                         one base for all directions; bias eps z'Hz / 2
    spread       c = (l+ - l0) / std(l+)                     FZOO: the length of the step is the learning rate
    curvature    c = (l+ - l-) / (2 eps max(floor, |k|^power)),   k = (l+ - 2 l0 + l-) / eps^2 = z'Hz

Losses are fp32 and differ in their last digits, so all of this is in double
precision, on the host. One-sided estimates need queries + 1 evaluations, the
others two for each query.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lowmem.errors import UserError


class Estimator(Protocol):
    """Which points are evaluated, and what is made of them; a frozen dataclass.

    Attributes:
        base: whether the loss at the weights themselves is needed.
        scaled: whether slopes grow with the loss, so that those of a split batch add up.
        sides: displacements along each direction, in units of eps.
    """

    @property
    def base(self) -> bool: ...
    @property
    def scaled(self) -> bool: ...
    @property
    def sides(self) -> tuple[float, ...]: ...

    def check(self, queries: int) -> None:
        """Raise where so many directions are too few."""

    def slopes(self, base: float, values: Sequence[Sequence[float]], eps: float) -> list[float]:
        """One slope for each direction.

        Args:
            base: the loss at the weights; NaN where it was not asked for.
            values: losses for each direction, one for each side.
            eps: radius of the perturbation.
        """


@dataclass(frozen=True)
class TwoSided:
    """Differences over both sides (arXiv 2305.17333).

    Example:
        >>> TwoSided().slopes(0.0, [(3.0, 1.0)], 0.5)
        [2.0]
    """

    base: bool = False
    scaled: bool = True
    sides: tuple[float, ...] = (1.0, -1.0)

    def check(self, queries: int) -> None:
        """One is enough."""

    def slopes(self, base: float, values: Sequence[Sequence[float]], eps: float) -> list[float]:
        """(l+ - l-) / (2 eps)."""
        return [(plus - minus) / (2 * eps) for plus, minus in values]


@dataclass(frozen=True)
class OneSided:
    """Differences to one shared base, or, by the spread of the losses, FZOO's (arXiv 2506.09034).

    Args:
        spread: divide by the standard deviation of the displaced losses instead of eps; where they are
            all the same there is no step.

    Example:
        >>> OneSided(spread=True).slopes(1.0, [(2.0,), (4.0,)], 1e-3) == [2**-0.5, 3 * 2**-0.5]
        True
    """

    spread: bool = False
    base: bool = True
    sides: tuple[float, ...] = (1.0,)

    @property
    def scaled(self) -> bool:
        """Not by the spread, which grows with the loss as well."""
        return not self.spread

    def check(self, queries: int) -> None:
        """A spread needs two losses."""
        if self.spread and queries < 2:
            raise UserError(
                f"queries: the spread of {queries} loss is not defined; take 2 or more (the paper has 8)"
            )

    def slopes(self, base: float, values: Sequence[Sequence[float]], eps: float) -> list[float]:
        """(l+ - l0) / eps, or over the spread."""
        unit = _spread([plus for (plus,) in values]) if self.spread else eps
        return [(plus - base) / unit for (plus,) in values]


@dataclass(frozen=True)
class Curved:
    """Two-sided, long steps along directions of small curvature (1.5-SPSA, arXiv 2609.38095).

    Args:
        power: of the curvature in the weight; floor: least weight.
    """

    power: float = 0.1
    floor: float = 1.0
    base: bool = True
    scaled: bool = True
    sides: tuple[float, ...] = (1.0, -1.0)

    def check(self, queries: int) -> None:
        """One is enough."""

    def slopes(self, base: float, values: Sequence[Sequence[float]], eps: float) -> list[float]:
        """(l+ - l-) / (2 eps max(floor, |k|^power))."""
        return [
            (plus - minus) / (2 * eps) / max(self.floor, abs(curvature(base, plus, minus, eps)) ** self.power)
            for plus, minus in values
        ]


def curvature(base: float, plus: float, minus: float, eps: float) -> float:
    """The second derivative along a direction, z'Hz; exact on a quadratic.

    >>> curvature(0.0, 2.0, 2.0, 1.0)
    4.0
    """
    return (plus - 2 * base + minus) / eps**2


def _spread(losses: Sequence[float]) -> float:
    if not all(math.isfinite(x) for x in losses):
        return math.nan
    return statistics.stdev(losses) or math.inf
