"""Rows of a tensor that is spread over ranks: what is held here, and how ranks sum and gather.

FSDP2 makes every parameter a `DTensor` whose rows lie on the ranks of one mesh dimension,
ceil(m / w) on each and fewer, or none, on the last. There are three ways to step one:

    rows     each rank steps its rows; what goes over all rows goes through `total`
    stack    a stack of matrices: each rank holds whole matrices, and steps them alone
    whole    every rank gathers weight and gradient, takes the whole step and keeps its rows

The last needs nothing of a rule and gives the bits of one device, but holds the state on
every rank; so it is what a rule gets that does not say that it takes `rows`, and a tensor
whose shards do not start on a block of its codec. Which way a tensor goes is decided by its
full shape and the number of ranks: on all ranks alike, or their collectives would not meet.

A `Shape` is the shape of the rows here that knows of what it is a part. It stands wherever a
shape stands, so that side and rank of a projection follow from the whole matrix.
Collectives are those of torch.distributed, which is imported where there is a `DTensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lowmem.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Rows first .. first + rows of a tensor.

    Args:
        full: shape of the whole tensor.
        chunk: rows on each rank but the last ones.
        ranks, rank: how many there are, and which one this is.
        group: the process group; None where steps are planned and not taken: nothing is exchanged.
    """

    full: tuple[int, ...]
    chunk: int
    ranks: int
    rank: int
    group: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, full: Sequence[int], ranks: int, rank: int, group: Any = None) -> Shard:
        """The rows that FSDP2 gives to a rank.

        >>> [Shard.of((5, 3), 4, rank).rows for rank in range(4)]
        [2, 2, 1, 0]
        """
        return cls(tuple(full), -(-full[0] // ranks), ranks, rank, group)

    @property
    def first(self) -> int:
        """The first row held here."""
        return min(self.rank * self.chunk, self.full[0])

    @property
    def rows(self) -> int:
        """How many are held here."""
        return min(self.chunk, self.full[0] - self.first)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.full[1:])

    @property
    def shape(self) -> Shape:
        """That of what is held here."""
        return Shape((self.rows, *self.full[1:]), self)

    def starts_on(self, grain: int) -> bool:
        """Whether every shard starts on a block of so many elements."""
        return self.chunk * self.width % grain == 0 or self.chunk >= self.full[0]

    def own(self, whole: Tensor) -> Tensor:
        """A view of the rows held here."""
        return whole[self.first : self.first + self.rows]

    def total(self, x: Tensor, op: str = "sum") -> Tensor:
        """The sum or maximum over ranks, the same bits on all of them; a NaN makes the maximum infinite."""
        if self.group is None:
            return x
        import torch.distributed as dist

        if op == "max":
            x = torch.where(x.isnan(), math.inf, x)  # some backends lose a NaN that is not on the first rank
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return out

    def gathered(self, own: Tensor) -> Tensor:
        """The whole tensor, contiguous, from the rows of all ranks."""
        if self.group is None:
            return own.new_empty(self.full[0], *own.shape[1:])
        import torch.distributed as dist

        padded = own.new_zeros(self.chunk, *own.shape[1:])
        padded[: own.shape[0]] = own
        out = own.new_empty(self.ranks, *padded.shape)
        dist.all_gather(list(out.unbind()), padded, group=self.group)
        return out.flatten(0, 1)[: self.full[0]]


class Shape(tuple[int, ...]):
    """The shape of the rows held here; `shard` says of what."""

    shard: Shard

    def __new__(cls, shape: Sequence[int], shard: Shard) -> Shape:
        made = super().__new__(cls, shape)
        made.shard = shard
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.shard


def shard_in(shape: Sequence[int]) -> Shard | None:
    """Of what a shape is a part, if of anything."""
    return shape.shard if isinstance(shape, Shape) else None


def whole(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the whole matrix.

    >>> whole((4, 3)), whole(Shard.of((4, 3), 2, 1).shape)
    ((4, 3), (4, 3))
    """
    return (shape.shard.full[0], shape.shard.full[1]) if isinstance(shape, Shape) else shape


def resized(shape: tuple[int, int], columns: int) -> tuple[int, int]:
    """A shape with as many rows, here and in all, and so many columns."""
    shard = shard_in(shape)
    return (shape[0], columns) if shard is None else matrix(replace(shard, full=(shard.full[0], columns)))


def matrix(shard: Shard) -> Any:
    """The (m, n) view of what is held here: rows by everything else."""
    return replace(shard, full=(shard.full[0], shard.width)).shape


def total(shape: Sequence[int], x: Tensor, op: str = "sum") -> Tensor:
    """Reduce over all rows of a matrix what was found in those held here."""
    shard = shard_in(shape)
    return x if shard is None else shard.total(x, op)


class ByRows:
    """What a rule or a projector says of some rows of a matrix; by default that it cannot do with them."""

    def shards(self, shape: Shape) -> bool:
        """Whether rows may be stepped, or projected, where they lie, with all sums by `Hyper.total`."""
        return False

    def unsound(self, g: Any, s: dict[str, Tensor], hp: Any) -> Tensor | None:
        """0-D fp32, 1 where the rows of g here forbid the step; None where none can, or sums tell of it."""
        return None


class Like:
    """What `init` looks at: the rows of a tensor that a rank would hold.

    Args:
        shape: of them; dtype, device: of the tensor.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def numel(self) -> int:
        """Elements held here."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def new_empty(self, *shape: Any) -> Tensor:
        """An ordinary tensor."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is held here; a tensor that is not spread as it is."""
    if not hasattr(x, "device_mesh"):
        return x
    own: Tensor = cast("Any", x).to_local()
    return own


def gathered(x: Tensor) -> Tensor:
    """All of a tensor, on every rank; one that is not spread as it is."""
    if not hasattr(x, "device_mesh"):
        return x
    whole: Tensor = cast("Any", x).full_tensor()
    return whole


_KNOWN: Any = WeakIdKeyDictionary()
"""The rows of parameters that were asked for before: finding them takes as long as a small kernel."""


def shard_of(x: Tensor) -> Shard | None:
    """The rows of a parameter that are held here; None where that is all of it.

    Raises:
        UserError: a tensor that is spread in another way than by rows over one mesh dimension.
    """
    placements = getattr(x, "placements", None)
    if placements is None:
        return None
    if x not in _KNOWN:
        _KNOWN[x] = _found(x, placements)
    known: Shard | None = _KNOWN[x]
    return known


def _found(x: Tensor, placements: Sequence[Any]) -> Shard | None:
    spread = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not spread:
        return None
    if len(spread) > 1 or type(placements[spread[0]]).__name__ != "Shard" or placements[spread[0]].dim != 0:
        raise UserError(
            f"a parameter of shape {tuple(x.shape)} is placed as {tuple(placements)}: rows may be "
            f"spread over one mesh dimension (Shard(0)), with copies over the others; take fully_shard "
            f"without tensor parallelism"
        )
    mesh, dim = x.device_mesh, spread[0]  # type: ignore[attr-defined]
    shard = Shard.of(x.shape, mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))
    if local(x.detach()).shape[0] != shard.rows:
        raise UserError(
            f"a parameter of shape {tuple(x.shape)} has {local(x).shape[0]} rows on rank {shard.rank}, not "
            f"the {shard.rows} of equal chunks; take fully_shard without a shard_placement_fn"
        )
    return shard


def refuse_flattened(p: Tensor) -> None:
    """Refuse parameters of engines that flatten them: a strategy needs rows and columns."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise UserError(
            "FullyShardedDataParallel (version 1) flattens parameters, and a strategy needs their shapes; "
            "take torch.distributed.fsdp.fully_shard, or fsdp_version 2"
        )
    if hasattr(p, "ds_id"):
        raise UserError(
            "DeepSpeed flattens parameters, and a strategy needs their shapes; take fsdp (version 2)"
        )
