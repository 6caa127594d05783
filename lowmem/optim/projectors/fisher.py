"""A fixed choice of single elements: those of which the loss knows most (FISH mask, arXiv 2111.09839).

The Fisher information of an element is the mean of its squared gradient. The elements
with the largest are found once, and nothing else is stepped, decayed or held from then
on: what is not chosen keeps its bits. Finding them takes no more memory than a block
does: the k-th largest of all is found digit by digit, by counting, and one more pass
writes down the places of those above it, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.contract import Projector
from lowmem.optim.engine.cutting import sizes, walk
from lowmem.optim.projectors.bases import check_rank
from lowmem.optim.projectors.coordinate import count_of
from lowmem.optim.terms.changes import Change, Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

EARLY, AGAIN = 16, 100
"""Elements are looked for in so many first steps, and then every so often, as long as gradients of zeros
(an adapter's first ones) or worse have none to find. No one waits for the device to know."""
PIECE = 1 << 18
"""Elements that are looked at together."""
DIGITS = ((20, 11), (9, 11), (0, 9))
"""Shift and width, in bits, of the digits of a number that is not negative; the highest first."""


@dataclass(frozen=True)
class Fisher(Projector):
    """The elements whose squared gradient was the largest when the run began: R is (1, k).

    Holds 4 k bytes, k = min(rank, m n), or floor(rank m n) of a share, at least 1. The first gradient
    decides: make its batch a large one, or write a choice of your own, ascending, into
    "projector.index" of the state that `init_state` makes.

    Args:
        rank: elements of a tensor, from 1 on, or their share, below 1.

    Example:
        >>> Fisher(0.1).low_shape((4, 5))
        (1, 2)
    """

    rank: float = 0.005
    renews: ClassVar[bool] = False
    partial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.rank)

    @property
    def period(self) -> int:
        """A tensor that has its choice keeps it."""
        return AGAIN

    def due(self, hp: Hyper, s: State | None = None) -> bool:
        """Early on, and now and then."""
        return hp.first or hp.step < EARLY or hp.due(AGAIN)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(1, k)."""
        size = shape[0] * shape[1]
        return 1, count_of(self.rank, size, int(self.rank * size))

    def complete(self, shape: tuple[int, int]) -> bool:
        """True where every element is chosen."""
        return self.low_shape(shape)[1] == shape[0] * shape[1]

    def init(self, x: Tensor) -> State:
        """Places in the order of the elements; -1 before they are found."""
        count = self.low_shape(matrix_shape(x.shape))[1]
        dtype = torch.int32 if x.numel() < 1 << 31 else torch.int64
        return {"index": torch.full((count,), -1, dtype=dtype, device=x.device)}

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Choose, where nothing is chosen yet; an element that is not finite is not."""
        index, nothing = s["index"], Unrelated(torch.zeros((), dtype=torch.bool, device=g.device))
        if sizes(index.device).at_hand and not index.is_meta and int(index[0]) >= 0:
            return nothing
        found = largest(g, index)
        chosen = (index[0] < 0) & (found[0] >= 0)
        index.add_(found.sub_(index).mul_(chosen))
        return nothing

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """The chosen elements; zeros before there are any."""
        return g.take(s["index"]).view(1, -1)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """The chosen elements at their places, zero elsewhere."""
        index, values, n = s["index"], low.view(-1), hp.weight.shape[1]
        start, stop = i * n, j * n
        if index.device.type == "cpu":  # its numbers are at hand
            first, last = torch.searchsorted(index, torch.tensor((start, stop))).tolist()
            index, values = index[first:last], values[first:last]
        flat = torch.zeros(stop - start + 1, device=low.device)  # the last is for those that lie elsewhere
        for a in range(0, index.numel(), PIECE):
            place = index[a : a + PIECE].long()
            place = torch.where((place >= start) & (place < stop), place - start, stop - start)
            flat.scatter_(0, place, values[a : a + PIECE])
        return flat[:-1].view(j - i, n)


def largest(g: Blocks, like: Tensor) -> Tensor:
    """The places of the largest elements by size, ascending; -1 throughout where all are zero.

    Args:
        g: (m, n); what is not finite counts as zero.
        like: a tensor of as many places as are wanted, in their dtype.
    """
    count = like.numel()
    least, ties = _kth(g, count)
    out = torch.full((count + 1,), -1, dtype=like.dtype, device=g.device)  # the last is for all others
    taken, equal = (torch.zeros((), dtype=torch.int64, device=g.device) for _ in range(2))
    top = torch.zeros((), dtype=torch.int32, device=g.device)
    for start, word in _words(g):
        same = word == least
        rank = same.cumsum(0, dtype=torch.int32) + equal
        take = (word > least) | (same & (rank <= ties))
        place = torch.where(take, take.cumsum(0, dtype=torch.int32) + (taken - 1), count)
        where = torch.arange(start, start + word.numel(), dtype=like.dtype, device=g.device)
        out.scatter_(0, place, where)
        taken += take.sum()
        equal += same.sum()
        top = torch.maximum(top, word.amax())
    return torch.where(top > 0, out[:count], -1)


def _kth(g: Blocks, count: int) -> tuple[Tensor, Tensor]:
    """The size of the count-th largest element, as an integer, and how many of that size are wanted."""
    prefix = torch.zeros((), dtype=torch.int64, device=g.device)
    wanted = torch.full((), count, dtype=torch.int64, device=g.device)
    for shift, width in DIGITS:
        counts = torch.zeros((1 << width) + 1, dtype=torch.int64, device=g.device)
        for _, word in _words(g):
            digit = (word >> shift) & ((1 << width) - 1)
            digit = torch.where((word >> shift >> width) == prefix, digit, 1 << width)
            counts.index_add_(0, digit, torch.ones_like(digit, dtype=torch.int64))
        counts[-1] = 0
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = (at_least >= wanted).sum() - 1
        wanted = wanted - at_least.index_select(0, (digit + 1).view(1))[0]
        prefix = (prefix << width) | digit
    return prefix.to(torch.int32), wanted


def _words(g: Blocks) -> Iterator[tuple[int, Tensor]]:
    """Where each piece begins, and the sizes of its elements as integers of the same order."""
    m, n = g.shape
    height = max(1, PIECE // n)
    for i, j in walk(((i, min(m, i + height)) for i in range(0, m, height)), g.device):
        size = g.rows(i, j).abs().reshape(-1)
        yield i * n, torch.where(size.isfinite(), size, 0.0).view(torch.int32)
