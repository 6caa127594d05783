"""Bases P of shape (s, r): which side of a matrix they span, and how they are made orthonormal.

    left:   P is (m, r), R = P' G is (r, n), lifted P R
    right:  P is (n, r), R = G P is (m, r), lifted R P'

`std` spans the short side, as GaLore does, so that R is r by long. The side is
resolved from the full shape; rank is clipped to the short one. `auto` is right where
rows are spread over ranks, so that R is spread as they are, and std elsewhere: an
optimizer decides once for all its tensors (`Strategy.sided`), and a checkpoint keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.shards import resized, shard_in, total, whole
from lowmem.optim.terms.changes import Change, Rotation, Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.products import product
from lowmem.optim.terms.state import State

PROJ_TYPES = ("std", "reverse_std", "left", "right", "auto")


@dataclass(frozen=True)
class Frame:
    """Geometry of a dense basis: which side it spans, how it maps down and up.

    Args:
        rank: columns of the basis, from 1 on, or their share of the side, below 1; clipped to the short
            side, which no gradient's rank exceeds.
        proj_type: std (short side), reverse_std (long side), left, right or auto.
    """

    rank: float
    proj_type: str = "std"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.proj_type not in PROJ_TYPES:
            raise UserError(f"unknown proj_type {self.proj_type!r}; {nearest(self.proj_type, PROJ_TYPES)}")

    def left(self, shape: tuple[int, int]) -> bool:
        """Whether the basis spans the rows' index (m); square weights are projected on the right."""
        side = self.proj_type
        if side == "auto":
            side = self.sided(shard_in(shape) is not None).proj_type
        if side in ("left", "right"):
            return side == "left"
        m, n = whole(shape)
        return (m < n) == (side == "std")

    def sided(self, spread: bool) -> Frame:
        """The frame with `auto` decided.

        >>> Frame(4, "auto").sided(spread=True).proj_type, Frame(4, "left").sided(spread=True).proj_type
        ('right', 'left')
        """
        return self if self.proj_type != "auto" else replace(self, proj_type="right" if spread else "std")

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(s, r) of the basis."""
        m, n = whole(shape)
        side = m if self.left(shape) else n
        rank = int(self.rank) if self.rank >= 1 else max(1, round(side * self.rank))
        return side, min(rank, m, n)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(r, n) on the left, all of it on every rank; (m, r) on the right, spread as the matrix is."""
        rank = self.size(shape)[1]
        return (rank, shape[1]) if self.left(shape) else resized(shape, rank)

    def init(self, x: Tensor) -> State:
        """The first r coordinate axes: orthonormal before any gradient was seen.

        Held vector by vector, as QR gives them: both products take a tenth less time than with rows.
        """
        side, rank = self.size(matrix_shape(x.shape))
        return {"basis": torch.eye(rank, side, device=x.device).t()}

    def down(self, basis: Tensor, g: Blocks) -> Tensor:
        """P' G or G P; of rows here, P' G of all."""
        if not self.left(g.shape):
            return g.right(basis)
        return total(g.shape, g.left(own_rows(basis, g.shape)))

    def across(self, low: Tensor, g: Blocks) -> Tensor:
        """G R' or G' R, (s, r): the other half of a power iteration; of all rows."""
        if not self.left(g.shape):
            return total(g.shape, g.left(low)).t()
        shard, own = shard_in(g.shape), g.right(low.t())
        return own if shard is None else shard.gathered(own)

    def largest(self, low: Tensor, g: Blocks) -> tuple[Tensor, Tensor]:
        """`largest` of a projected gradient, be it spread or not."""
        if shard_in(self.low_shape(g.shape)) is None:
            return largest(low)
        low = low if low.numel() else low.new_zeros(1)
        return usable(total(g.shape, low.abs().amax(), "max"))

    def up(self, basis: Tensor, low: Tensor, i: int, j: int, weight: Blocks) -> Tensor:
        """Rows of P R or R P', in the precision of the weight."""
        left = self.left(weight.shape)
        a, b = (own_rows(basis, weight.shape)[i:j], low) if left else (low[i:j], basis.t())
        return product(a.to(weight.dtype), b.to(weight.dtype))

    def pair(self, basis: Tensor, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The two factors of the lifted matrix."""
        return (own_rows(basis, shape), low) if self.left(shape) else (low, basis.t())

    def replace_(self, basis: Tensor, new: Tensor, ok: Tensor, shape: tuple[int, int], say: bool) -> Change:
        """Store a new basis where ok, and say how the coordinates change."""
        new = torch.where(ok, new, basis)
        change = Rotation(ok, new.t() @ basis, self.axis(shape)) if say else Unrelated(ok)
        basis.copy_(new)
        return change

    def axis(self, shape: tuple[int, int]) -> int:
        """The axis of the projected gradient that the basis spans."""
        return 0 if self.left(shape) else 1


def own_rows(basis: Tensor, shape: tuple[int, int]) -> Tensor:
    """What of a basis on the left belongs to the rows held here; every rank has all of it."""
    shard = shard_in(shape)
    return basis if shard is None else shard.own(basis)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude, 1 where x is not usable; and a 0-D bool: all finite and not all zero."""
    low, high = x.aminmax()
    return usable(torch.maximum(high, -low))


def usable(top: Tensor) -> tuple[Tensor, Tensor]:
    """A largest magnitude, 1 where it is not finite or 0; and a 0-D bool, whether it is."""
    ok = torch.isfinite(top) & (top != 0)
    return torch.where(ok, top, 1.0), ok


def unit(x: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """x (used up) over its largest element, so that no square overflows; the fallback where not usable."""
    top, ok = largest(x)
    return torch.where(ok, x.div_(top), fallback), ok


def energy(g: Blocks, top: Tensor, hp: Hyper) -> Tensor:
    """|G / top|^2 of all rows, 0-D fp32."""
    return total(g.shape, hp.parts(_energy, g, (top,)).sum(0)).float()


def _energy(rows: Tensor, top: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows / top, dtype=torch.float64)
    return norm.square()


def orthonormal(x: Tensor) -> Tensor:
    """The QR factor of x with the sign of R's diagonal divided out: it follows x without flipping."""
    q, r = torch.linalg.qr(x)
    signed: Tensor = q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0))
    return signed


def check_rank(rank: float) -> None:
    """Refuse a size that is neither a number from 1 on nor a share below 1."""
    if not (0.0 < rank < 1.0 or (rank >= 1.0 and rank % 1.0 == 0.0)):
        raise UserError(f"rank is a whole number from 1 on, or a share between 0 and 1, got {rank}")
