"""Projectors that pick coordinates: whole columns, or single elements.

Picking is exact: up(down(G)) copies elements, so a residual of the rest is
exactly zero where a coordinate is active, and picking everything is the
identity. Choices are random, named by parameter and step, and sorted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.blocks import BLOCK, Blocks, Dense, matrix_shape
from lowmem.optim.contract import Projector
from lowmem.optim.engine import noise
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.projectors.bases import check_rank
from lowmem.optim.projectors.dense import check_gap
from lowmem.optim.shards import Shape, resized, shard_in
from lowmem.optim.terms.changes import Change, Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

GROUP = 256
"""Elements of a group of `Elements`; an index within it is one byte."""


def _choose(first: int, rows: int, count: int, pick: int, hp: Hyper) -> Tensor:
    """Sorted random choices, (rows, pick) int64: `pick` of `count` in each row from row `first` on."""
    device = hp.weight.device
    key = noise.key_tensor([(hp.seed, hp.step, hp.name, "coordinates")], device)
    words = noise.bits(noise.positions(first * count, rows * count, device), key[0]).view(rows, count)
    return words.argsort(dim=1, stable=True)[:, :pick].sort(dim=1).values


def count_of(rank: float, of: int, share: int) -> int:
    """So many of `of`: a number from 1 on, clipped, or a share below 1 that came to `share`; at least 1."""
    return max(1, min(int(rank), of) if rank >= 1 else share)


@dataclass(frozen=True)
class Coordinates(Projector):
    """What both are: a choice that is made anew, whatever the gradient.

    Args:
        rank: what is seen, a number from 1 on, or a share below 1.
        update_proj_gap: steps between choices, at least 1.
    """

    rank: float
    update_proj_gap: int = 200

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_gap(self.update_proj_gap)

    @property
    def period(self) -> int:
        """Steps between choices."""
        return self.update_proj_gap


@dataclass(frozen=True)
class Columns(Coordinates):
    """A random subset of columns (FRUGAL, arXiv 2411.07837): R = G[:, index] is (m, r).

    Holds 4 r bytes, r = min(rank, n), or floor(rank n) of a share, at least 1.

    Args:
        rank: columns, from 1 on, or their share, below 1.
        update_proj_gap: steps between choices, at least 1.
    """

    def _rank(self, shape: tuple[int, int]) -> int:
        return count_of(self.rank, shape[1], int(self.rank * shape[1]))

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(m, r)."""
        return resized(shape, self._rank(shape))

    def shards(self, shape: Shape) -> bool:
        """Always: every rank picks the same columns."""
        return True

    def complete(self, shape: tuple[int, int]) -> bool:
        """True where every column is active."""
        return self._rank(shape) == shape[1]

    def init(self, x: Tensor) -> State:
        """The first r columns."""
        rank = self._rank(matrix_shape(x.shape))
        return {"index": torch.arange(rank, dtype=torch.int32, device=x.device)}

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Choose anew; the gradient is not looked at."""
        s["index"].copy_(_choose(0, 1, g.shape[1], s["index"].shape[0], hp)[0])
        return Unrelated(torch.ones((), dtype=torch.bool, device=g.device))

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """The active columns."""
        if isinstance(g, Dense) and g.tensor.is_contiguous() and not sizes(g.device).at_hand:
            picked = g.tensor.view(g.shape).index_select(1, s["index"]).float()
            return picked if g.factor is None else picked.mul_(g.factor)
        return torch.cat([g.rows(i, j).index_select(1, s["index"]) for i, j in g.ranges()])

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """The active columns at their places, zero elsewhere."""
        rows = torch.zeros(j - i, hp.weight.shape[1], device=low.device)
        return rows.index_copy_(1, s["index"].long(), low[i:j])


@dataclass(frozen=True)
class Elements(Coordinates):
    """A random subset of single elements (FRUGAL's randk), the same number in each group of 256.

    R is (ceil(m n / 256), k), k = min(rank, 256), or round(256 rank) of a share, at
    least 1. Holds one byte for each chosen element, where index pairs would take sixteen.

    Args:
        rank: elements of each group, from 1 on, or their share, below 1.
        update_proj_gap: steps between choices, at least 1.
    """

    @property
    def _picked(self) -> int:
        return count_of(self.rank, GROUP, round(GROUP * self.rank))

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(groups, k)."""
        shard = shard_in(shape)
        if shard is None:
            return -(-shape[0] * shape[1] // GROUP), self._picked
        groups, chunk = (-(-rows * shard.width // GROUP) for rows in (shard.full[0], shard.chunk))
        spread: Any = replace(shard, full=(groups, self._picked), chunk=chunk).shape
        low: tuple[int, int] = spread
        return low

    def shards(self, shape: Shape) -> bool:
        """Where every shard starts on a group."""
        return shape.shard.starts_on(GROUP)

    def complete(self, shape: tuple[int, int]) -> bool:
        """True where every element is active."""
        return self._picked == GROUP

    def init(self, x: Tensor) -> State:
        """The first k elements of each group."""
        groups = self.low_shape(matrix_shape(x.shape))[0]
        first = torch.arange(self._picked, dtype=torch.uint8, device=x.device)
        return {"index": first.repeat(groups, 1)}

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Choose anew, some groups at a time; the gradient is not looked at."""
        index, first = s["index"], hp.offset // GROUP
        step = BLOCK // GROUP // 4
        for a in range(0, index.shape[0], step):
            b = min(a + step, index.shape[0])
            index[a:b] = _choose(first + a, b - a, GROUP, self._picked, hp)
        return Unrelated(torch.ones((), dtype=torch.bool, device=g.device))

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """The active elements, group by group."""
        index, total = s["index"], g.shape[0] * g.shape[1]
        parts = []
        for a in range(0, max(1, index.shape[0]), BLOCK // GROUP):
            b = min(a + BLOCK // GROUP, index.shape[0])
            flat = g.chunk(a * GROUP, min(b * GROUP, total)).float()
            flat = torch.nn.functional.pad(flat, (0, (b - a) * GROUP - flat.numel()))
            parts.append(flat.view(b - a, GROUP).gather(1, index[a:b].long()))
        return torch.cat(parts)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """The active elements at their places, zero elsewhere."""
        n = hp.weight.shape[1]
        a, b = i * n // GROUP, -(-j * n // GROUP)
        groups = torch.zeros(b - a, GROUP, device=low.device)
        groups.scatter_(1, s["index"][a:b].long(), low[a:b])
        return groups.view(-1)[i * n - a * GROUP : j * n - a * GROUP].view(j - i, n)
