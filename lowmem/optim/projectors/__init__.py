"""Where a gradient is seen.

A projector maps an (m, n) gradient G to a smaller matrix R = down(G) and back.
`refresh` moves the basis when it is due and says how it changed; the basis is
fp32, whatever the weight is. A basis is kept as it was when the gradient is
zero or not finite, so it is orthonormal at all times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import Hyper, State


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did.

    Args:
        ok: 0-D bool; False where the old basis was kept.
        matrix: (r, r) fp32, coordinates in the old basis to the new one; None unless asked for.
        axis: the axis of the projected gradient that the basis spans (0 for (r, n)).
    """

    ok: Tensor
    matrix: Tensor | None = None
    axis: int = 0


class Projector(Protocol):
    """Where a gradient is seen. Shapes are those of the (m, n) matrix."""

    @property
    def rotates(self) -> bool:
        """Whether `refresh` can give the matrix of a basis change."""

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of down(G)."""

    def complete(self, shape: tuple[int, int]) -> bool:
        """Whether up(down(G)) = G: nothing is left for a residual."""

    def init(self, x: Tensor) -> State:
        """The basis before the first refresh."""

    def shared(self, x: Tensor) -> State:
        """Constants that one optimizer holds once for each key."""

    def due(self, hp: Hyper) -> bool:
        """Whether a refresh falls on this step; decided on the host."""

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, matrix: bool) -> Refreshed:
        """Move the basis; with `matrix`, say how."""

    def down(self, s: State, g: Blocks) -> Tensor:
        """The projected gradient, fp32."""

    def up(self, s: State, low: Tensor, i: int, j: int, like: Blocks) -> Tensor:
        """Rows i..j of the lifted matrix, fp32 or as `like` says, which gives shape and precision."""

    def pair(self, s: State, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """(A, B) with up(low) = A B, where the lift is a product."""
