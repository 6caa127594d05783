"""Matrices made of others, and passes over them: what a card can do in one call, and a CPU block by block.

A rule that needs a number of the whole tensor goes over it before it steps. On a CPU that goes row block by
row block (`Blocks.ranges`), whose copies stay in cache. On a card each block is a handful of launches, a
hundred times over. What a compiler fuses needs no blocks there: nothing is held on the way. So a matrix says
what it is made of (`Leaf`) where it can: tensors, vectors, and a function that its kernels are kept by. Who
takes one pass (`Hyper.sweep`) gives a function that works in place, and does not hear how it is called.

Compiled, sums over all rows at once have their terms in another order than those of blocks: their last bits
are of the way that is taken. Eager ones go by the same blocks everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.engine.cutting import sizes, walk

CAST = 8 << 20
"""Bytes of factors that are kept cast between the rows of a product."""

Read = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Leaf:
    """What a kernel takes of a matrix, to read it.

    Args:
        name: of `read`: equal ones read alike.
        down: what has its rows: contiguous tensors, (m, n) or (m, 1), and products that are still to be made.
        across: vectors (n,) and 0-D tensors.
        read: those to the matrix, (m, n) fp32.
    """

    name: Hashable
    down: tuple[Tensor | Product, ...]
    across: tuple[Tensor, ...]
    read: Read

    @property
    def takes(self) -> int:
        """Bytes that are made for each element before it is read."""
        return sum(x.takes for x in self.down if isinstance(x, Product))

    def rows(self, i: int, j: int) -> list[Tensor]:
        """What it takes of rows i..j."""
        down = (x.made(i, j) if isinstance(x, Product) else x[i:j] for x in self.down)
        return [*down, *self.across]


class Held(Blocks):
    """A matrix of which a kernel can take what it is made of."""

    def leaf(self) -> Leaf | None:
        """None where it cannot."""
        raise NotImplementedError


def leaf_of(x: Blocks) -> Leaf | None:
    """What a kernel takes of a matrix; None where it is made in some way of its own."""
    if isinstance(x, Held):
        return x.leaf()
    if not isinstance(x, Dense) or not x.tensor.is_contiguous():  # another layout is another kernel
        return None
    if x.factor is None:
        return Leaf("dense", (x.tensor.view(x.shape),), (), _cast)
    return Leaf("scaled", (x.tensor.view(x.shape),), (x.factor,), _cast_and_scaled)


def _cast(down: Sequence[Tensor], across: Sequence[Tensor]) -> Tensor:
    return down[0].float()


def _cast_and_scaled(down: Sequence[Tensor], across: Sequence[Tensor]) -> Tensor:
    return down[0].float() * across[0]


class Product(Held):
    """A B as rows that are made when they are looked at.

    Args:
        pair: A and B, (m, k) and (k, n), fp32; dtype: precision of the product.
    """

    def __init__(self, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        shape = (pair[0].shape[0], pair[1].shape[1])
        super().__init__(shape, None, pair[0].device, takes=dtype.itemsize)
        self.pair, self.precision = pair, dtype

    @functools.cached_property
    def _cast(self) -> tuple[Tensor, Tensor] | None:
        small = self.precision.itemsize * (self.pair[0].numel() + self.pair[1].numel()) <= CAST
        if not small or sizes(self.device).at_hand:  # a launch costs more than a little memory on a card
            return None
        return self.pair[0].to(self.precision), self.pair[1].to(self.precision)

    def made(self, i: int, j: int) -> Tensor:
        """Rows i..j in the precision of the product."""
        a, b = self._cast or self.pair
        return a[i:j].to(self.precision) @ b.to(self.precision)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32."""
        return self.made(i, j).float()

    def chunk(self, start: int, stop: int) -> Tensor:
        """In the precision of the product: kernels cast as they read."""
        n = self.shape[1]
        i = start // n
        return self.made(i, -(-stop // n)).view(-1)[start - i * n : stop - i * n]

    def leaf(self) -> Leaf:
        """The product, once it is made."""
        return Leaf("dense", (self,), (), _cast)


class Formula(Held):
    """A matrix whose rows are a function of those of others.

    Args:
        f: rows of each matrix, (h, n), entries of each vector, (h, 1), and what is across, to (h, n). Of a
            module, or a frozen value: kernels are kept by it.
        of: matrices of one shape; down: vectors (m,); across: vectors (n,) and 0-D tensors.
    """

    def __init__(
        self, f: Callable[..., Tensor], of: Sequence[Blocks], down: Sequence[Tensor] = (),
        across: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        super().__init__(of[0].shape, None, of[0].device)
        self.f, self.of, self.down, self.across = f, tuple(of), tuple(down), tuple(across)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j, made anew."""
        return self.f(*(x.rows(i, j) for x in self.of), *(v[i:j, None] for v in self.down), *self.across)

    def leaf(self) -> Leaf | None:
        """That of its parts, one after the other."""
        parts = [part for part in map(leaf_of, self.of) if part is not None]
        if len(parts) < len(self.of):
            return None
        sizes = [(len(part.down), len(part.across)) for part in parts]
        name = (self.f, *(part.name for part in parts), len(self.down), len(self.across))
        down = (*(x for part in parts for x in part.down), *(v[:, None] for v in self.down))
        across = (*(x for part in parts for x in part.across), *self.across)
        reads, f = [part.read for part in parts], self.f

        def read(down: Sequence[Tensor], across: Sequence[Tensor]) -> Tensor:
            found, a, b = [], 0, 0
            for each, (downs, acrosses) in zip(reads, sizes, strict=True):
                found.append(each(down[a : a + downs], across[b : b + acrosses]))
                a, b = a + downs, b + acrosses
            return f(*found, *down[a:], *across[b:])

        return Leaf(name, down, across, read)


def minus(a: Tensor, b: Tensor) -> Tensor:
    """a - b."""
    return a - b


def sweep(
    f: Callable[..., None], x: Blocks | None, rows: Sequence[Tensor] = (), whole: Sequence[Tensor] = (),
    fixed: tuple[Hashable, ...] = (),
) -> None:  # fmt: skip
    """A pass over a matrix, row block by row block.

    Args:
        f: rows (h, n), the entries of `rows` that belong to them, `whole` and `fixed`; it works in place, on
            what it is given of both, and does not mix rows but by adding to what is whole.
        x: the matrix; None where there is none to read, and the first of `rows` is filled.
        rows: tensors with its rows, (m,) or (m, n); whole: vectors of other lengths, and keys.
        fixed: numbers and such, that kernels are made for.
    """
    covered = Dense(rows[0]) if x is None else x
    for i, j in walk(covered.ranges(), covered.device):
        read = () if x is None else (x.rows(i, j),)
        f(*read, *(v[i:j] for v in rows), *whole, *fixed)
