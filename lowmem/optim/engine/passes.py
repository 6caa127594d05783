"""Passes over a whole matrix in one call, where kernels are compiled and it is large; see `formulas`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.engine.compiling.kernel import Kernel, compiled
from lowmem.optim.engine.cutting import sizes, walk
from lowmem.optim.formulas import ByBlocks, Held, Leaf, each, leaf_of

COLUMNS = 2048
"""A strip of columns begins with such a number of them: with a block of every codec."""


class Passes(ByBlocks):
    """Takes passes, and keeps the kernels of those that are taken at once.

    Args:
        compile: whether kernels are compiled.
    """

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self._kernels: dict[tuple[Hashable, ...], Kernel] = {}

    def leaf(self, x: Blocks) -> Leaf | None:
        """What a kernel takes of a matrix; None where it goes block by block."""
        m, n = x.shape
        return leaf_of(x) if self.compile and m * n >= sizes(x.device).passes else None

    def takes(self, x: Blocks) -> int:
        """Bytes that looking makes for each element: where one call does it, fp32 and what it reads."""
        leaf = self.read_by_a_kernel(x)
        return x.takes if leaf is None else 4 + leaf.takes

    def read_by_a_kernel(self, x: Blocks) -> Leaf | None:
        """What a kernel takes of a matrix that is neither there nor made as it is."""
        leaf = self.leaf(x) if x.takes else None
        return None if leaf is None or leaf.down[:1] == (x,) else leaf

    def _at_once(self, device: torch.device) -> bool:
        return self.compile and not sizes(device).at_hand

    def sweep(
        self, f: Callable[..., None], x: Blocks | None, rows: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (), fixed: tuple[Hashable, ...] = (),
    ) -> None:  # fmt: skip
        """A pass over a matrix, at once if that can be; otherwise as `ByBlocks.sweep`."""
        leaf = None if x is None else self.leaf(x)
        if leaf is None and (x is not None or not self._at_once(rows[0].device)):
            super().sweep(f, x, rows, whole, fixed)
            return
        flat = tuple(v.dim() == 1 for v in rows)
        seen = [v[:, None] if one else v for v, one in zip(rows, flat, strict=True)]
        name, step = (f, leaf.name if leaf else "", flat, fixed), _sweeping(f, leaf, flat, fixed)
        ranges = [(0, rows[0].shape[0])] if x is None or leaf is None else self.ranges(x, leaf)
        for i, j in ranges:
            self.call(name, step, [*(leaf.rows(i, j) if leaf else ()), *(v[i:j] for v in seen), *whole])

    def parts(
        self, f: Callable[..., Tensor], x: Blocks, whole: Sequence[Tensor] = (),
        fixed: tuple[Hashable, ...] = (), count: int = 0, dtype: torch.dtype = torch.float64,
    ) -> Tensor:  # fmt: skip
        """The numbers of all rows at once, if that can be; otherwise as `ByBlocks.parts`."""
        leaf = self.leaf(x)
        if leaf is None:
            return super().parts(f, x, whole, fixed, count, dtype)
        ranges = list(self.ranges(x, leaf))
        out = torch.empty((len(ranges), count) if count else len(ranges), dtype=dtype, device=x.device)
        name, step = ("parts", f, leaf.name, fixed), _finding(f, leaf, fixed)
        for k, (i, j) in enumerate(ranges):
            # torch 2.13 leaves an fp64 number alone that has no dimension
            self.call(name, step, [*leaf.rows(i, j), *whole, out[k] if count else out[k : k + 1]])
        return out

    def reckon(
        self, f: Callable[..., None], tensors: Sequence[Tensor], fixed: tuple[Hashable, ...] = ()
    ) -> None:
        """In one call, if that can be."""
        if not self._at_once(tensors[0].device):
            super().reckon(f, tensors, fixed)
            return

        def run(*given: Tensor) -> None:
            f(*given, *fixed)

        self.call(("reckon", f, fixed), run, tensors)

    def seen(self, x: Blocks) -> Blocks:
        """The matrix as `Seen`, where a call makes many of its rows."""
        leaf = None if isinstance(x, Dense | Seen) else self.leaf(x)
        return x if leaf is None else Seen(x, leaf, self)

    @staticmethod
    def ranges(x: Blocks, leaf: Leaf) -> Iterable[tuple[int, int]]:
        """All rows at once, unless some of what is read must be made first."""
        m, n = x.shape
        most = leaf.most(sizes(x.device).made)
        height = max(1, most // n) if most else max(1, m)
        return walk([(i, min(m, i + height)) for i in range(0, max(1, m), height)], x.device)

    def chunk(self, x: Blocks, start: int, stop: int) -> Tensor:
        """Flat row-major elements start..stop; made by one call, where that can be."""
        leaf = self.read_by_a_kernel(x)
        if leaf is None:
            return x.chunk(start, stop)
        n = x.shape[1]
        i, j = start // n, -(-stop // n)
        return self.rows(leaf, i, j, n).view(-1)[start - i * n : stop - i * n]

    def rows(self, leaf: Leaf, i: int, j: int, n: int) -> Tensor:
        """Rows i..j of n elements in fp32, made by one call."""
        return self._written(leaf, leaf.rows(i, j), (j - i, n))

    def columns(self, leaf: Leaf, a: int, b: int, shape: tuple[int, int]) -> Tensor:
        """Columns a..b in fp32, made by one call."""
        return self._written(leaf, leaf.columns(a, b, shape[1]), (shape[0], b - a))

    def _written(self, leaf: Leaf, tensors: list[Tensor], shape: tuple[int, int]) -> Tensor:
        out = torch.empty(shape, device=tensors[0].device)
        self.call((leaf.name,), _reading(leaf), [*tensors, out])
        return out

    def call(self, name: tuple[Hashable, ...], step: Kernel, tensors: Sequence[Tensor]) -> None:
        """Call the kernel of a name. It holds nothing on the way; without memory there is nothing to do."""
        if tensors[0].is_meta:
            return
        found, order = once(tensors)
        key = (*name, order, *alike(found))
        if key not in self._kernels:
            self._kernels[key] = compiled(_repeating(step, order))
        self._kernels[key](*found)


def once(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Each tensor once, and which of them each was: a compiler takes two that are one for two."""
    found: dict[Hashable, Tensor] = {}
    keys = [(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype) for x in tensors]
    for key, tensor in zip(keys, tensors, strict=True):
        found.setdefault(key, tensor)
    places = {key: i for i, key in enumerate(found)}
    return list(found.values()), tuple(places[key] for key in keys)


def _repeating(step: Kernel, order: tuple[int, ...]) -> Kernel:
    if order == tuple(range(len(order))):
        return step

    def run(*found: Tensor) -> None:
        step(*(found[k] for k in order))

    return run


def alike(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What a kernel is made for, of tensors whose rows, those of the first if it has any, are left open."""
    first = tensors[0]
    open_rows = first.dim() > 1
    shapes = tuple(
        (
            x.shape[1:] if open_rows and x.dim() > 1 else x.shape,
            x.dtype,
            () if x.is_contiguous() else x.stride(),
        )
        for x in tensors
    )
    return shapes, open_rows and first.shape[0] == 1, first.device


class Seen(Held):
    """A matrix for products: a call makes as many of its rows as may be made at once.

    Args:
        x: the matrix; leaf: what is taken of it; passes: who makes it.
    """

    def __init__(self, x: Blocks, leaf: Leaf, passes: Passes) -> None:
        super().__init__(x.shape, None, x.device, x.dtype, x.takes)
        self.x, self._leaf, self._passes = x, leaf, passes

    def leaf(self) -> Leaf:
        """That of the matrix."""
        return self._leaf

    @property
    def panel(self) -> int:
        """As many as may be made at once."""
        return sizes(self.device).made // 4

    def _side(self, other: int) -> int:
        """Rows of so many elements that may be made at once, or columns."""
        return sizes(self.device).made // (4 + self._leaf.takes) // max(1, other)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Row ranges of what may be made at once."""
        m, n = self.shape
        height = max(1, self._side(n))
        for i in range(0, max(1, m), height):
            yield i, min(m, i + height)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j in fp32."""
        return self._passes.rows(self._leaf, i, j, self.shape[1])

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat elements start..stop."""
        return self._passes.chunk(self.x, start, stop)

    def strips(self) -> list[tuple[int, int]]:
        """Column ranges, where columns can be made as rows can."""
        m, n = self.shape
        width = self._side(m) // COLUMNS * COLUMNS
        if len(self._leaf.tensors) < len(self._leaf.down) or not width:
            return []
        return [(a, min(n, a + width)) for a in range(0, n, width)]

    def columns(self, a: int, b: int) -> Tensor:
        """Columns a..b in fp32."""
        return self._passes.columns(self._leaf, a, b, self.shape)


def _sweeping(
    f: Callable[..., None], leaf: Leaf | None, flat: Sequence[bool], fixed: tuple[Hashable, ...]
) -> Kernel:
    count, read = reader(leaf)

    def run(*tensors: Tensor) -> None:
        rest = tensors[count:]
        rows = [v[:, 0] if one else v for v, one in zip(rest, flat, strict=False)]
        f(*read(tensors), *rows, *rest[len(flat) :], *fixed)

    return run


def _finding(f: Callable[..., Tensor], leaf: Leaf, fixed: tuple[Hashable, ...]) -> Kernel:
    count, read = reader(leaf)

    def run(*tensors: Tensor) -> None:
        tensors[-1].copy_(f(*read(tensors), *tensors[count:-1], *fixed))

    return run


def reading_first(step: Kernel, leaf: Leaf, order: tuple[int, ...]) -> Kernel:
    """The step of a chunk that reads its gradient itself.

    Args:
        step: of the weight, the gradient and the rest; leaf: of the gradient.
        order: which of the first tensors are the weight, and what is read of the leaf, see `once`.
    """
    (_, read), count = reader(leaf), max(order) + 1

    def run(*tensors: Tensor) -> None:
        (matrix,) = read([tensors[k] for k in order[1:]])
        step(tensors[0], matrix, *tensors[count:])

    return run


def _reading(leaf: Leaf) -> Kernel:
    _, read = reader(leaf)

    def run(*tensors: Tensor) -> None:
        (matrix,) = read(tensors)
        tensors[-1].copy_(matrix)

    return run


def reader(leaf: Leaf | None) -> tuple[int, Callable[[Sequence[Tensor]], tuple[Tensor, ...]]]:
    """How many tensors are a leaf's, and what they make: the matrices."""
    if leaf is None:
        return 0, lambda tensors: ()
    downs, both, read = len(leaf.down), len(leaf.down) + len(leaf.across), leaf.read  # nothing to be held
    return both, lambda tensors: each(read(tensors[:downs], tensors[downs:both]))
