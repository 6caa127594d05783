"""Projectors with a basis P of shape (s, r) that is held, or opened for a step.

See `bases` for the side that P spans. What differs between the projectors is where P comes from.

A first gradient of zeros (an expert that no token went to, an adapter whose other half is zero) or worse
tells no basis: P stays the first r coordinate axes, and a basis is looked for again at steps 1, 2, 4, 8, ...
P itself says that none was found, so that nothing more is held and no one waits for the device to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Projected
from lowmem.optim.contract import Projector
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.projectors.bases import Frame, orthonormal, unit
from lowmem.optim.shards import Shape, shard_in
from lowmem.optim.terms.changes import Change
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

F = TypeVar("F", bound=Callable[..., Any])


def of_all_rows(find: F) -> F:
    """Say of a `Find` that it sums over all rows, where they are spread over ranks."""
    find.of_all_rows = True  # type: ignore[attr-defined]
    return find


Find = Callable[[Frame, Tensor, Blocks, Hyper], tuple[Tensor, Tensor]]
"""(frame, basis before, gradient, hyper) to the new basis and whether the gradient could tell one."""


def looks_again(step: int) -> bool:
    """Whether a basis that was not found yet is looked for at this step.

    >>> [step for step in range(20) if looks_again(step)]
    [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


def found(basis: Tensor) -> Tensor:
    """Whether a basis is more than so many axes, as it begins, or all of the side; 0-D bool."""
    side, rank = basis.shape
    if side == rank:
        return torch.ones((), dtype=torch.bool, device=basis.device)
    return basis.count_nonzero() != rank


def holds(flag: Tensor) -> bool:
    """Whether a 0-D bool is true, read from its device; False where nothing is computed."""
    return not flag.is_meta and not hasattr(flag, "fake_mode") and bool(flag)


def begin(find: Find, frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """What a `Find` makes of the gradient as if it were the first; not ok where there is a basis already."""
    there = found(basis)
    if isinstance(g, Projected) or (sizes(basis.device).at_hand and holds(there)):
        return basis, torch.zeros_like(there)
    new, ok = find(frame, basis, g, replace(hp, first=True))
    return new, ok & ~there


@of_all_rows
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
    top, good = frame.largest(low, g)
    # in place: a second copy of R would double the workspace of a refresh
    y, fine = unit(frame.across(low.div_(top), g), q)
    return orthonormal(y), good & fine


@of_all_rows
def svd(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """The r leading singular vectors, exactly (arXiv 2403.03507).

    Costs O(m n s) and an fp32 copy of the gradient with its factors: on every rank,
    where rows are spread. Signs follow the basis before, since an SVD leaves them open.
    """
    copy, shard = torch.cat([g.rows(i, j) for i, j in g.ranges()]), shard_in(g.shape)
    copy = copy if shard is None else shard.gathered(copy)
    scaled, ok = unit(copy, torch.zeros((), device=basis.device))
    u, _, vh = torch.linalg.svd(scaled, full_matrices=False)
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

    Holds 4 s r bytes, s the side it spans; where rows are spread, on every rank.

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

    def shards(self, shape: Shape) -> bool:
        """Where the basis is found of all rows: every rank has all of it."""
        return getattr(self.find, "of_all_rows", False)

    @property
    def period(self) -> int:
        """Steps between refreshes."""
        return self.update_proj_gap

    def init(self, x: Tensor) -> State:
        """See Frame."""
        return self.frame.init(x)

    def due(self, hp: Hyper, s: State | None = None) -> bool:
        """By the period, and where a basis may be missing."""
        lacks = looks_again(hp.step) and (s is None or holds(~found(self.opened(s, hp)["basis"])))
        return super().due(hp) or lacks

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Find the new basis and store it; between two refreshes, where none was found yet."""
        if super().due(hp):
            return self.renew(s, g, hp, inner, say=say)
        old = self.opened(s, hp)["basis"]
        # nothing is turned where nothing is found, not even by a product with what is nearly the identity
        return self.store(s, *begin(self.find, self.frame, old, g, hp), g.shape, say=False)

    def renew(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """A refresh that is due by the period."""
        return self.store(s, *self.find(self.frame, s["basis"], g, hp), g.shape, say=say)

    def store(self, s: State, new: Tensor, ok: Tensor, shape: tuple[int, int], *, say: bool) -> Change:
        """Hold a basis where ok."""
        return self.frame.replace_(s["basis"], new, ok, shape, say)

    def rounded(self, s: State, dtype: torch.dtype) -> State:
        """The basis, cast."""
        return {"basis": s["basis"].to(dtype)}


def check_gap(gap: int) -> None:
    """Refuse a refresh gap below 1."""
    if gap < 1:
        raise UserError(f"update_proj_gap must be at least 1 step, got {gap}")
