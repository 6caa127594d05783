"""What a refresh does to the coordinates of a projected gradient, for those who hold moments there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What a refresh did to the coordinates of a projected gradient; where `ok` (0-D) is False, nothing."""

    ok: Tensor


@dataclass(frozen=True)
class Unrelated(Change):
    """The new coordinates have nothing to do with the old ones: start afresh, with age 0."""


@dataclass(frozen=True)
class Permutation(Change):
    """Coordinates have moved, gone and come.

    Args:
        index: (r,) int64, where each coordinate was before; -1 for one that is new.
        axis: of the coordinates, 0 where the projected gradient is (r, n), 1 where it is (m, r).
    """

    index: Tensor
    axis: int


@dataclass(frozen=True)
class Rotation(Change):
    """low_new = C low_old along one axis; C is (r_new, r_old) fp32, the axis as in `Permutation`."""

    matrix: Tensor
    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        """C x along the axis."""
        return self.along(self.matrix, x)

    def squares(self, x: Tensor) -> Tensor:
        """(C o C) x along the axis: what becomes of variances of independent coordinates."""
        return self.along(self.matrix.square(), x)

    def along(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix applied to the axis of the basis."""
        return matrix @ x if self.axis == 0 else x @ matrix.t()
