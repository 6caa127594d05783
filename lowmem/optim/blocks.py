"""A matrix seen as row blocks, and a step not yet taken.

Gradients, weights and steps are as large as the weight; a second fp32 copy of
one of them is what a low-memory optimizer cannot afford. `Blocks` stands for an
(m, n) matrix that is only ever looked at in pieces: casts, the clip factor,
error feedback and zeroth-order noise happen inside a piece. Pieces are flat
ranges of the row-major elements (`chunk`, for element-wise rules) or whole rows
(`rows`, for rules that need the matrix). Looking is pure and can be repeated.

A `Direction` is such a matrix together with what the frame needs to take the
step: W <- decay W - lr D. It may be read many times before it is written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.engine.cutting import walk
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.shards import Shape, matrix
from lowmem.optim.terms.products import product

PANEL = 1 << 22
"""Elements that are held at a time for a product of large matrices."""
BLOCK = 1 << 20
"""Elements of a row block of which sums are added up, at most (one row at least); the same everywhere."""


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """The (m, n) view of a tensor: rows by everything else; vectors are one row.

    >>> matrix_shape((8, 3, 3, 3)), matrix_shape((5,)), matrix_shape(())
    ((8, 27), (1, 5), (1, 1))
    """
    if isinstance(shape, Shape):
        found: tuple[int, int] = matrix(shape.shard)
        return found
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


class Blocks:
    """An (m, n) matrix given by a function of a row range.

    Args:
        shape: (m, n); a `shards.Shape` where these are some rows of a larger matrix.
        rows: maps (i, j) to the rows i..j, (j - i, n), in any floating dtype; None where a subclass has
            its own `rows`. A bound method of the object itself would be a reference cycle, and what it
            holds (a gradient) would live until the garbage collector runs.
        device: where rows live.
        dtype: precision of matrix products with it (fp32, or bf16 where the data is bf16).
        takes: bytes that looking makes for each element, on the way; 0 where a chunk is a view.

    Attributes:
        panel: elements that may be held at a time for a product with it.
    """

    @property
    def panel(self) -> int:
        """The same everywhere."""
        return PANEL

    def __init__(
        self,
        shape: tuple[int, int],
        rows: Callable[[int, int], Tensor] | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        takes: int = 16,
    ) -> None:
        self.shape = shape
        self.device = device
        self.dtype = dtype
        self.takes = takes
        self._rows = rows

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32, (j - i, n); not to be written to."""
        if self._rows is None:
            raise NotImplementedError(f"{type(self).__name__} has no rows")
        return self._rows(i, j).float()

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat row-major elements start..stop, in any floating dtype; not to be written to."""
        n = self.shape[1]
        first = start // n
        look = self._rows or self.rows  # kernels cast as they read
        flat = look(first, -(-stop // n)).contiguous().view(-1)  # of a single row, reshape gives it strided
        return flat[start - first * n : stop - first * n]

    def take(self, index: Tensor) -> Tensor:
        """Elements at flat row-major places, ascending, in fp32; zero where a place is below 0."""
        n, out = self.shape[1], torch.zeros(index.numel(), device=self.device)
        for i, j in self.ranges():
            flat = self.rows(i, j).reshape(-1)
            for a in range(0, index.numel(), BLOCK):
                place = index[a : a + BLOCK].long() - i * n
                inside = (place >= 0) & (place < flat.numel()) & (index[a : a + BLOCK] >= 0)
                out[a : a + BLOCK] += torch.where(inside, flat[place.clamp(0, flat.numel() - 1)], 0.0)
        return out

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most `BLOCK` elements that cover the matrix; one without rows if it has none."""
        m, n = self.shape
        height = max(1, BLOCK // max(1, n))
        for i in range(0, max(1, m), height):
            yield i, min(m, i + height)

    def map(self, f: Callable[[Tensor], Tensor]) -> Blocks:
        """The matrix with f applied to each row block; f must not mix rows."""
        return Blocks(self.shape, lambda i, j: f(self.rows(i, j)), self.device, self.dtype)

    def left(self, q: Tensor) -> Tensor:
        """q' G in fp32: (m, k) and (m, n) to (k, n)."""
        out = torch.zeros(q.shape[1], self.shape[1], device=self.device)
        for i, j in walk(self.ranges(), self.device):
            out.addmm_(q[i:j].t(), self.rows(i, j))
        return out

    def right(self, q: Tensor) -> Tensor:
        """G q in fp32: (m, n) and (n, k) to (m, k)."""
        out = torch.empty(self.shape[0], q.shape[1], device=self.device)
        for i, j in walk(self.ranges(), self.device):
            out[i:j] = self.rows(i, j) @ q
        return out

    def sum(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over row blocks of f(block)."""
        parts = [f(self.rows(i, j)) for i, j in self.ranges()]
        return torch.stack(parts).sum(0)

    def strips(self) -> list[tuple[int, int]]:
        """Column ranges that `columns` makes as easily as rows; none where rows are all there is."""
        return []

    def columns(self, a: int, b: int) -> Tensor:
        """Columns a..b in fp32, (m, b - a)."""
        raise NotImplementedError(f"{type(self).__name__} is looked at row by row")


class Dense(Blocks):
    """A matrix that is held as a tensor, times an optional 0-D factor.

    Args:
        tensor: any shape and floating dtype; seen as `matrix_shape`.
        factor: 0-D fp32 on the same device (the clip factor), or None for 1.
        shape: (m, n) as a part of a larger matrix; that of the tensor, if None.
    """

    def __init__(
        self, tensor: Tensor, factor: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> None:
        shape = matrix_shape(tensor.shape) if shape is None else shape
        dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
        view = factor is None and tensor.layout == torch.strided and tensor.is_contiguous()
        super().__init__(shape, None, tensor.device, dtype, 0 if view else 8)
        self.tensor = tensor
        self.factor = factor

    @functools.cached_property
    def _matrix(self) -> Tensor:
        return self.tensor.reshape(self.shape) if self.tensor.dim() < 2 else self.tensor.flatten(1)

    @functools.cached_property
    def _flat(self) -> Tensor | None:
        return self.tensor.view(-1) if self.tensor.is_contiguous() else None

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32, cast and scaled block by block; contiguous: any layout gives the same bits."""
        rows = self._matrix[i:j].float().contiguous()
        return rows if self.factor is None else rows * self.factor

    def chunk(self, start: int, stop: int) -> Tensor:
        """A view where the layout allows it."""
        if self._flat is None:
            return super().chunk(start, stop)
        piece = self._flat[start:stop]
        return piece if self.factor is None else piece.float() * self.factor

    def take(self, index: Tensor) -> Tensor:
        """Each element once, whatever the layout."""
        n, out = self.shape[1], torch.zeros(index.numel(), device=self.device)
        for a in range(0, index.numel(), BLOCK // 4):
            piece = index[a : a + BLOCK // 4]
            place = piece.clamp(min=0).long()
            found = self._matrix[place // n, place % n].float()
            found = found if self.factor is None else found * self.factor
            out[a : a + BLOCK // 4] = torch.where(piece >= 0, found, 0.0)
        return out

    def left(self, q: Tensor) -> Tensor:
        """One product in the data's own precision: the whole matrix is never cast."""
        if self._matrix.dtype != self.dtype:
            return super().left(q)
        return self._scaled(product(q.t().to(self.dtype), self._matrix))

    def right(self, q: Tensor) -> Tensor:
        """One product in the data's own precision: the whole matrix is never cast."""
        if self._matrix.dtype != self.dtype:
            return super().right(q)
        return self._scaled(product(self._matrix, q.to(self.dtype)))

    def _scaled(self, found: Tensor) -> Tensor:
        found = found.float()
        return found if self.factor is None else found.mul_(self.factor)


class Decoded(Blocks):
    """A matrix that is held as int8 codes, decoded where it is looked at.

    Args:
        weight: any shape; seen as `matrix_shape`.
    """

    def __init__(self, weight: Int8Weight) -> None:
        dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        super().__init__(matrix_shape(weight.shape), None, weight.device, dtype, 8)
        self.weight = weight

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32."""
        n = self.shape[1]
        return self.weight.flat(i * n, j * n).view(j - i, n)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Its blocks alone."""
        return self.weight.flat(start, stop)


def held(weight: Tensor) -> Blocks:
    """A weight as it is held, dense or in codes."""
    return Decoded(weight) if isinstance(weight, Int8Weight) else Dense(weight)


class Slice(Blocks):
    """Some rows of a matrix that is drawn where it is looked at.

    Args:
        whole: the matrix; shape: of the rows, with where they are.
    """

    def __init__(self, whole: Blocks, shape: Shape) -> None:
        super().__init__(matrix_shape(shape), None, whole.device, whole.dtype)
        self.whole, self.first = whole, shape.shard.first
        self.offset = self.first * shape.shard.width

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j of those here."""
        return self.whole.rows(self.first + i, self.first + j)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat elements of those here."""
        return self.whole.chunk(self.offset + start, self.offset + stop)


class Projected(Blocks):
    """A gradient of which only the projection was kept, (r, n) or (m, r).

    Args:
        shape: (m, n) of the gradient.
        low: what `Projector.down` gave, summed over the micro-batches; fp32.
        dtype: precision of the products that made it.
    """

    def __init__(self, shape: tuple[int, int], low: Tensor, dtype: torch.dtype) -> None:
        super().__init__(shape, None, low.device, dtype)
        self.low = low

    def rows(self, i: int, j: int) -> Tensor:
        """Nothing to give: the gradient is gone."""
        raise RuntimeError(
            "only the projected gradient was kept: rules that read the whole gradient cannot use it"
        )


@dataclass(frozen=True)
class Direction:
    """A step not yet taken: W <- decay W - lr scale D.

    Args:
        blocks: D, (m, n).
        pair: (A, B) with D = A B, where the product alone is the step.
        scale: a number known on the host.
        lr: 0-D fp32 tensor, where the rule sets its own; None for the group's.
        decay: 0-D fp32 tensor, likewise.
        ok: 0-D bool; False leaves the weight as it is. None for True.
        commit: what is left to do once the weight is written; it may still read D.
        then: a pointwise rule that turns D into the step while it is written, and its state; the frame
            moves its age.
    """

    blocks: Blocks
    pair: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    lr: Tensor | None = None
    decay: Tensor | None = None
    ok: Tensor | None = None
    commit: Callable[[], None] | None = None
    then: tuple[Any, dict[str, Tensor]] | None = None  # a Pointwise of `contract`, which stands above


def chained(commits: Sequence[Callable[[], None] | None]) -> Callable[[], None] | None:
    """All that is left to do, in order."""
    left = [commit for commit in commits if commit is not None]

    def commit() -> None:
        for each in left:
            each()

    return commit if left else None
