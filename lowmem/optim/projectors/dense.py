"""Projectors with an orthonormal basis P of shape (s, r).

    left:   P is (m, r), R = P' G is (r, n), lifted P R
    right:  P is (n, r), R = G P is (m, r), lifted R P'

`std` spans the short side, as GaLore does, so that R is r by long. The side is
resolved from the full shape; rank is clipped to the short one. What differs between
the projectors is where P comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.changes import Change, Rotation, Unrelated
from lowmem.optim.contract import Projector
from lowmem.optim.hyper import Hyper
from lowmem.optim.state import State

PROJ_TYPES = ("std", "reverse_std", "left", "right")


@dataclass(frozen=True)
class Frame:
    """Geometry of a dense basis: which side it spans, how it maps down and up.

    Args:
        rank: columns of the basis, from 1 on, or their share of the side, below 1; clipped to the short
            side, which no gradient's rank exceeds.
        proj_type: std (short side), reverse_std (long side), left or right.
    """

    rank: float
    proj_type: str = "std"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.proj_type not in PROJ_TYPES:
            raise UserError(f"unknown proj_type {self.proj_type!r}; {nearest(self.proj_type, PROJ_TYPES)}")

    def left(self, shape: tuple[int, int]) -> bool:
        """Whether the basis spans the rows' index (m); square weights are projected on the right."""
        m, n = shape
        if self.proj_type in ("left", "right"):
            return self.proj_type == "left"
        return (m < n) == (self.proj_type == "std")

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(s, r) of the basis."""
        side = shape[0] if self.left(shape) else shape[1]
        rank = int(self.rank) if self.rank >= 1 else max(1, round(side * self.rank))
        return side, min(rank, *shape)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(r, n) on the left, (m, r) on the right."""
        rank = self.size(shape)[1]
        return (rank, shape[1]) if self.left(shape) else (shape[0], rank)

    def init(self, x: Tensor) -> State:
        """The first r coordinate axes: orthonormal before any gradient was seen.

        Held vector by vector, as QR gives them: both products take a tenth less time than with rows.
        """
        side, rank = self.size(matrix_shape(x.shape))
        return {"basis": torch.eye(rank, side, device=x.device).t()}

    def down(self, basis: Tensor, g: Blocks) -> Tensor:
        """P' G or G P."""
        return g.left(basis) if self.left(g.shape) else g.right(basis)

    def across(self, low: Tensor, g: Blocks) -> Tensor:
        """G R' or G' R, (s, r): the other half of a power iteration."""
        return g.right(low.t()) if self.left(g.shape) else g.left(low).t()

    def up(self, basis: Tensor, low: Tensor, i: int, j: int, weight: Blocks) -> Tensor:
        """Rows of P R or R P', in the precision of the weight."""
        a, b = (basis[i:j], low) if self.left(weight.shape) else (low[i:j], basis.t())
        return a.to(weight.dtype) @ b.to(weight.dtype)

    def pair(self, basis: Tensor, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The two factors of the lifted matrix."""
        return (basis, low) if self.left(shape) else (low, basis.t())

    def replace_(self, basis: Tensor, new: Tensor, ok: Tensor, shape: tuple[int, int], say: bool) -> Change:
        """Store a new basis where ok, and say how the coordinates change."""
        new = torch.where(ok, new, basis)
        change = Rotation(ok, new.t() @ basis, self.axis(shape)) if say else Unrelated(ok)
        basis.copy_(new)
        return change

    def axis(self, shape: tuple[int, int]) -> int:
        """The axis of the projected gradient that the basis spans."""
        return 0 if self.left(shape) else 1


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude, 1 where x is not usable; and a 0-D bool: all finite and not all zero."""
    low, high = x.aminmax()
    top = torch.maximum(high, -low)
    ok = torch.isfinite(top) & (top != 0)
    return torch.where(ok, top, 1.0), ok


def unit(x: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """x (used up) over its largest element, so that no square overflows; the fallback where not usable."""
    top, ok = largest(x)
    return torch.where(ok, x.div_(top), fallback), ok


def energy(g: Blocks, top: Tensor) -> Tensor:
    """|G / top|^2, 0-D fp32."""
    return g.sum(lambda rows: torch.linalg.vector_norm(rows / top, dtype=torch.float64).square()).float()


def orthonormal(x: Tensor) -> Tensor:
    """The QR factor of x with the sign of R's diagonal divided out: it follows x without flipping."""
    q, r = torch.linalg.qr(x)
    signed: Tensor = q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0))
    return signed


Find = Callable[[Frame, Tensor, Blocks, Hyper], tuple[Tensor, Tensor]]
"""(frame, basis before, gradient, hyper) to the new basis and whether the gradient could tell one."""


def power_iteration(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """Warm-started power iteration: P <- orth(G G' P).

    A tenth of an SVD's time for 99 % of its captured energy. The first refresh
    starts from a random basis and takes two iterations, later ones take one.
    """
    start = hp.first or hp.step == 0
    side, rank = basis.shape
    q = orthonormal(hp.gaussian((side, rank), "basis")) if start else basis
    ok = torch.ones((), dtype=torch.bool, device=basis.device)
    for _ in range(2 if start else 1):
        q, fine = _iterate(frame, q, g)
        ok = ok & fine
    return q, ok


def _iterate(frame: Frame, q: Tensor, g: Blocks) -> tuple[Tensor, Tensor]:
    """One power iteration; of its own so that R is gone before the next one is made."""
    low = frame.down(q, g)
    top, good = largest(low)
    # in place: a second copy of R would double the workspace of a refresh
    y, fine = unit(frame.across(low.div_(top), g), q)
    return orthonormal(y), good & fine


def svd(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """The r leading singular vectors, exactly (arXiv 2403.03507).

    Costs O(m n s) and an fp32 copy of the gradient with its factors. Signs
    follow the basis before, since an SVD leaves them open.
    """
    whole, ok = unit(torch.cat([g.rows(i, j) for i, j in g.ranges()]), torch.zeros((), device=basis.device))
    u, _, vh = torch.linalg.svd(whole, full_matrices=False)
    rank = basis.shape[1]
    new = (u[:, :rank] if frame.left(g.shape) else vh[:rank].t()).contiguous()
    return new * torch.where((new * basis).sum(0) < 0, -1.0, 1.0), ok


@dataclass(frozen=True)
class Framed(Projector):
    """What projectors with a dense basis share: geometry, and products with the "basis" that `opened` gives.

    Args:
        frame: rank and side.
    """

    frame: Frame
    dense: ClassVar[bool] = True

    def axis(self, shape: tuple[int, int]) -> int:
        """See Frame."""
        return self.frame.axis(shape)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """See Frame."""
        return self.frame.low_shape(shape)

    def complete(self, shape: tuple[int, int]) -> bool:
        """True where an orthonormal basis reaches the side."""
        side, rank = self.frame.size(shape)
        return self.orthonormal and side == rank

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """P' G or G P."""
        return self.frame.down(s["basis"], g)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """Rows of P R or R P'."""
        return self.frame.up(s["basis"], low, i, j, hp.weight)

    def pair(self, s: State, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The two factors of the lifted matrix."""
        return self.frame.pair(s["basis"], low, shape)


@dataclass(frozen=True)
class Renewed(Framed):
    """A dense basis that is another one every `update_proj_gap` steps.

    Args:
        frame: rank and side.
        update_proj_gap: steps with the same basis, at least 1.

    Raises:
        UserError: a gap below 1.
    """

    update_proj_gap: int = 200

    def __post_init__(self) -> None:
        check_gap(self.update_proj_gap)

    @property
    def period(self) -> int:
        """Steps with the same basis."""
        return self.update_proj_gap


@dataclass(frozen=True)
class Orthonormal(Framed):
    """An orthonormal basis that is found anew every `update_proj_gap` steps.

    Holds 4 s r bytes, s the side it spans.

    Args:
        frame: rank and side.
        find: power_iteration or svd.
        update_proj_gap: steps between refreshes, at least 1.

    Example:
        >>> Orthonormal(Frame(4)).low_shape((16, 64))
        (4, 64)
    """

    find: Find = power_iteration
    update_proj_gap: int = 200
    changes: ClassVar[str] = "rotate"

    def __post_init__(self) -> None:
        check_gap(self.update_proj_gap)

    @property
    def period(self) -> int:
        """Steps between refreshes."""
        return self.update_proj_gap

    def init(self, x: Tensor) -> State:
        """See Frame."""
        return self.frame.init(x)

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Find the new basis and store it."""
        new, ok = self.find(self.frame, s["basis"], g, hp)
        return self.frame.replace_(s["basis"], new, ok, g.shape, say)


def check_rank(rank: float) -> None:
    """Refuse a size that is neither a number from 1 on nor a share below 1."""
    if not (0.0 < rank < 1.0 or (rank >= 1.0 and rank % 1.0 == 0.0)):
        raise UserError(f"rank is a whole number from 1 on, or a share between 0 and 1, got {rank}")


def check_gap(gap: int) -> None:
    """Refuse a refresh gap below 1."""
    if gap < 1:
        raise UserError(f"update_proj_gap must be at least 1 step, got {gap}")
