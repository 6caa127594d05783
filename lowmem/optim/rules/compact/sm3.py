"""SM3: sums of squares by their row and column maxima (arXiv 1901.11150).

What divides a gradient is made of the two vectors row block by row block. A vector is a
matrix of one row: then both hold its second moment exactly, in one number for each element.
A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.codecs.blockwise import Codec, codec
from lowmem.optim.codecs.factored import RowCol
from lowmem.optim.codecs.rankone import maxima
from lowmem.optim.contract import Rule
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.shards import Shape
from lowmem.optim.terms.fp32 import LARGEST_MEAN
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed, scoped


@dataclass(frozen=True)
class SM3(Rule):
    """Adagrad with sums of squares bounded by a number for each row and column (SM3-II, arXiv 1901.11150).

        N = min(R, C) + G^2,  R <- row maxima of N,  C <- column maxima of N
        U = G / sqrt(N),  D = U, or M <- M + (1 - momentum)(U - M) and D = M

    No element of N is smaller than the sum of all its squares so far. N never shrinks: steps become
    shorter as in Adagrad, so lr may stay as it is. Bytes for an (m, n) weight: 4 (m + n), and with a momentum
    what the codec takes, 4 m n in fp32; for a vector of d elements 4 d + 4.

    Args:
        held: codec of the momentum, None for no momentum.
        momentum: share of the old momentum, in [0, 1); 0 for none.
        floor: share of the largest element of N that is added to each, at least 0: in a subspace, a
            direction that the gradient does not have holds rounding noise.

    Example:
        >>> {key: tuple(value.shape) for key, value in SM3().init(torch.zeros(3, 5)).items()}
        {'accumulator.row': (3,), 'accumulator.col': (5,)}
    """

    held: Codec | None = None
    momentum: float = 0.0
    floor: float = 0.0
    small: ClassVar[float] = 1e-30

    @classmethod
    def of(cls, states: str, *, momentum: float = 0.0, floor: float = 0.0) -> SM3:
        """The rule with its momentum, if there is one, held as `states` says.

        Raises:
            UserError: a momentum outside [0, 1).
        """
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"momentum must be in [0, 1), got {momentum}")
        return cls(codec(states, signed=True, stream="momentum") if momentum else None, momentum, floor)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    @property
    def reads_later(self) -> bool:
        """Where a momentum is moved."""
        return self.held is not None

    def init(self, x: Tensor) -> State:
        """Sums of zero, and a momentum of zero, if there is one."""
        sums = prefixed("accumulator", RowCol().init(x))
        return sums | (prefixed("momentum", self.held.init(x)) if self.held else {})

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held) if self.held else {}

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the momentum; column maxima are those of all rows."""
        return self.held is None or shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the new maxima; the step is made from the old ones while it is written."""
        sums = scoped(s, "accumulator")
        n = Formula(_grown, (g,), (sums["row"],), (sums["col"],))
        new = maxima(hp.seen(n), hp)
        top = new["col"].amax()
        ok, small = top <= LARGEST_MEAN, self.floor * top + self.small
        u = Formula(_divided, (g, n), across=(small,))

        def grow() -> None:
            for key, value in new.items():
                sums[key].copy_(torch.where(ok, value, sums[key]))

        if self.held is None:
            return Direction(u, ok=ok, commit=grow)
        moment = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp)
        follow = moment.following(u, 1.0 - self.momentum, ok)

        def commit() -> None:
            follow()
            grow()

        return Direction(moment.towards(u, 1.0 - self.momentum), ok=ok, commit=commit)


def _grown(g: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """N, fresh."""
    return torch.minimum(row, col).addcmul_(g, g)


def _divided(g: Tensor, n: Tensor, small: Tensor) -> Tensor:
    return g * n.add_(small).rsqrt_()
