"""Matrices made of others, and passes over them: what a compiler fuses in one call, the rest block by block.

A rule that needs a number of the whole tensor goes over it before it steps. Eager, that goes row block by row
block (`Blocks.ranges`): copies stay in a CPU's cache, but on a card each block is a handful of launches, a
hundred times over. What a compiler fuses needs no blocks: nothing is held on the way. So a matrix says
what it is made of (`Leaf`) where it can: tensors, vectors, and a function that its kernels are kept by. Who
takes one pass (`Hyper.sweep`, `Hyper.parts`) gives a function, and does not hear how it is called. Products
with a matrix that is a formula make some of its rows at a time (`Hyper.seen`).

Compiled, sums over all rows at once have their terms in another order than those of blocks: their last bits
are of the way that is taken. Eager ones go by the same blocks everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.engine.cutting import sizes, walk
from lowmem.optim.terms.products import product

CAST = 8 << 20
"""Bytes of factors that are kept cast between the rows of a product."""

Read = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Leaf:
    """What a kernel takes of a matrix, to read it.

    Args:
        name: of `read`: equal ones read alike.
        down: what has its rows: contiguous tensors, (m, k), k numbers for n elements in their order, or one
            for all of a row; and what is still to be made.
        across: vectors (n,), 0-D tensors, and tables, (1, k).
        read: those to the matrix, (m, n) fp32.
    """

    name: Hashable
    down: tuple[Tensor | Made, ...]
    across: tuple[Tensor, ...]
    read: Read

    @property
    def takes(self) -> int:
        """Bytes that are made for each element before it is read."""
        return sum(x.takes for x in self.down if isinstance(x, Made))

    def most(self, made: int) -> int:
        """Elements that may be read at once where so many bytes may be made for it; 0 for all."""
        kinds = [x for x in self.down if isinstance(x, Made)]
        return min(x.most(made // len(kinds)) for x in kinds) if kinds else 0

    def rows(self, i: int, j: int) -> list[Tensor]:
        """What it takes of rows i..j."""
        down = (x.made(i, j) if isinstance(x, Made) else x[i:j] for x in self.down)
        return [*down, *self.across]

    def columns(self, a: int, b: int, n: int) -> list[Tensor]:
        """What it takes of columns a..b of n, where they begin and end with a block of what is held."""
        cuts = [(x, x.shape[1]) for x in self.tensors]
        down = [x if k == 1 else x[:, a * k // n : b * k // n] for x, k in cuts]
        return [*down, *(v[a:b] if v.dim() == 1 else v for v in self.across)]

    @property
    def tensors(self) -> list[Tensor]:
        """What has its rows and is there."""
        return [x for x in self.down if isinstance(x, Tensor)]


class Held(Blocks):
    """A matrix of which a kernel can take what it is made of."""

    def leaf(self) -> Leaf | None:
        """None where it cannot."""
        raise NotImplementedError


class Made(Held):
    """A matrix whose rows are made before a kernel can take them.

    Attributes:
        takes: bytes of an element that is made.
    """

    def made(self, i: int, j: int) -> Tensor:
        """Rows i..j in any floating dtype."""
        raise NotImplementedError

    def most(self, made: int) -> int:
        """Elements of so many bytes."""
        return made // self.takes

    def leaf(self) -> Leaf:
        """What is made, as it is."""
        return Leaf("dense", (self,), (), _cast)


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


class Product(Made):
    """A B as rows that are made when they are looked at.

    Args:
        pair: A and B, (m, k) and (k, n), fp32; dtype: precision of the product.
        shape: (m, n) as a part of a larger matrix; that of the product, if None.
    """

    def __init__(
        self, pair: tuple[Tensor, Tensor], dtype: torch.dtype, shape: tuple[int, int] | None = None
    ) -> None:
        shape = (pair[0].shape[0], pair[1].shape[1]) if shape is None else shape
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
        return product(a[i:j].to(self.precision), b.to(self.precision))

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32."""
        return self.made(i, j).float()

    def chunk(self, start: int, stop: int) -> Tensor:
        """In the precision of the product: kernels cast as they read."""
        n = self.shape[1]
        i = start // n
        return self.made(i, -(-stop // n)).view(-1)[start - i * n : stop - i * n]


class Lifted(Made):
    """Rows that a projector lifts in a way of its own when they are looked at.

    Args:
        shape: (m, n); up: maps (i, j) to the rows i..j; device: where they live.
    """

    def __init__(
        self, shape: tuple[int, int], up: Callable[[int, int], Tensor], device: torch.device
    ) -> None:
        super().__init__(shape, up, device, takes=6)  # places beside what is lifted

    def made(self, i: int, j: int) -> Tensor:
        """Rows i..j."""
        return self.rows(i, j)


class Formula(Held):
    """A matrix whose rows are a function of those of others.

    Args:
        f: rows of each matrix, (h, n), entries of each vector, (h, 1), and what is across, to (h, n), element
            by element; or to several matrices, for a pass. Of a module, or a frozen value: kernels are kept
            by it.
        of: matrices of one shape; down: vectors (m,); across: vectors (n,) and 0-D tensors.
    """

    def __init__(
        self, f: Callable[..., Any], of: Sequence[Blocks], down: Sequence[Tensor] = (),
        across: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        super().__init__(of[0].shape, None, of[0].device)
        self.f, self.of, self.down, self.across = f, tuple(of), tuple(down), tuple(across)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j, made anew."""
        of = (x.rows(i, j) for x in self.of)
        found: Tensor = self.f(*of, *(v[i:j, None] for v in self.down), *self.across)
        return found

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
            made: Tensor = f(*found, *down[a:], *across[b:])
            return made

        return Leaf(name, down, across, read)


def minus(a: Tensor, b: Tensor) -> Tensor:
    """a - b."""
    return a - b


def together(*of: Tensor) -> tuple[Tensor, ...]:
    """Several matrices for one pass, as a `Formula`."""
    return of


def each(read: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The matrices that a pass reads."""
    return read if isinstance(read, tuple) else (read,)


class ByBlocks:
    """Passes over a matrix, row block by row block."""

    def leaf(self, x: Blocks) -> Leaf | None:
        """What a kernel takes of a matrix: there is none."""
        return None

    def sweep(
        self, f: Callable[..., None], x: Blocks | None, rows: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (), fixed: tuple[Hashable, ...] = (),
    ) -> None:  # fmt: skip
        """A pass that fills, or adds to, what it is given.

        Args:
            f: rows (h, n) of each matrix, the entries of `rows` that belong to them, `whole` and `fixed`; it
                works in place, on what it is given of both, and does not mix rows but by adding to what is
                whole.
            x: the matrix; None where there is none to read, and the first of `rows` is filled.
            rows: tensors with its rows, (m,) or (m, k); whole: vectors of other lengths, and keys.
            fixed: numbers and such, that kernels are made for.
        """
        covered = Dense(rows[0]) if x is None else x
        for i, j in walk(covered.ranges(), covered.device):
            read = () if x is None else each(x.rows(i, j))
            f(*read, *(v[i:j] for v in rows), *whole, *fixed)

    def parts(
        self, f: Callable[..., Tensor], x: Blocks, whole: Sequence[Tensor] = (),
        fixed: tuple[Hashable, ...] = (), count: int = 0, dtype: torch.dtype = torch.float64,
    ) -> Tensor:  # fmt: skip
        """A pass that finds numbers, (parts, count); one for each part, (parts,), where count is 0.

        Args:
            f: rows (h, n) of each matrix, `whole` and `fixed` to the numbers of these rows.
            x: the matrix; whole, fixed: as for `sweep`; count, dtype: of what f gives.
        """
        blocks = walk(x.ranges(), x.device)
        return torch.stack([f(*each(x.rows(i, j)), *whole, *fixed) for i, j in blocks])

    def reckon(
        self, f: Callable[..., None], tensors: Sequence[Tensor], fixed: tuple[Hashable, ...] = ()
    ) -> None:
        """What follows from vectors and numbers alone: f works in place, on `tensors` by `fixed`."""
        f(*tensors, *fixed)

    def seen(self, x: Blocks) -> Blocks:
        """The matrix, for products: as many of its rows at a time as may be made at once."""
        return x
