"""Passes over a whole matrix in one call, where a card's kernels are compiled; see `formulas`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.engine.compiling import Kernel, compiled
from lowmem.optim.engine.cutting import sizes, walk
from lowmem.optim.formulas import Leaf, Product, leaf_of, sweep


class Passes:
    """Takes passes, and keeps the kernels of those that are taken at once.

    Args:
        compile: whether kernels are compiled.
    """

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self._kernels: dict[tuple[Hashable, ...], Kernel] = {}

    def leaf(self, x: Blocks) -> Leaf | None:
        """What a kernel takes of a matrix; None where it goes block by block."""
        return leaf_of(x) if self._at_once(x.device) else None

    def takes(self, x: Blocks) -> int:
        """Bytes that looking makes for each element: where one call does it, fp32 and what it reads."""
        leaf = self.leaf(x) if x.takes and not isinstance(x, Product) else None
        return x.takes if leaf is None else 4 + leaf.takes

    def _at_once(self, device: torch.device) -> bool:
        return self.compile and not sizes(device).at_hand

    def sweep(
        self, f: Callable[..., None], x: Blocks | None, rows: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (), fixed: tuple[Hashable, ...] = (),
    ) -> None:  # fmt: skip
        """A pass over a matrix, at once if that can be; otherwise as `formulas.sweep`."""
        leaf = None if x is None else self.leaf(x)
        if leaf is None and (x is not None or not self._at_once(rows[0].device)):
            sweep(f, x, rows, whole, fixed)
            return
        flat = tuple(v.dim() == 1 for v in rows)
        seen = [v[:, None] if one else v for v, one in zip(rows, flat, strict=True)]
        name, step = (f, leaf.name if leaf else "", flat, fixed), _sweeping(f, leaf, flat, fixed)
        for i, j in _ranges(x, leaf, rows):
            self.call(name, step, [*(leaf.rows(i, j) if leaf else ()), *(v[i:j] for v in seen), *whole])

    def chunk(self, x: Blocks, start: int, stop: int) -> Tensor:
        """Flat row-major elements start..stop; made by one call, where that can be."""
        leaf = self.leaf(x) if x.takes and not isinstance(x, Product) else None
        if leaf is None:
            return x.chunk(start, stop)
        n = x.shape[1]
        i, j = start // n, -(-stop // n)
        out = torch.empty(j - i, n, device=x.device)
        self.call((leaf.name,), _reading(leaf), [*leaf.rows(i, j), out])
        return out.view(-1)[start - i * n : stop - i * n]

    def call(self, name: tuple[Hashable, ...], step: Kernel, tensors: Sequence[Tensor]) -> None:
        """Call the kernel of a name. It holds nothing on the way; without memory there is nothing to do."""
        # the rows of the first tensor are left open
        shapes = tuple((x.shape if x.dim() < 2 else x.shape[1:], x.dtype) for x in tensors)
        key = (*name, shapes, tensors[0].shape[0] == 1, tensors[0].device)
        if tensors[0].is_meta:
            return
        if key not in self._kernels:
            self._kernels[key] = compiled(step)
        self._kernels[key](*tensors)


def _ranges(x: Blocks | None, leaf: Leaf | None, rows: Sequence[Tensor]) -> Iterable[tuple[int, int]]:
    """All rows at once, unless some of what is read must be made first."""
    if x is None or leaf is None or not leaf.takes:
        return [(0, rows[0].shape[0] if x is None else x.shape[0])]
    (m, n), made = x.shape, sizes(x.device).look(leaf.takes, compiled=True)
    height = max(1, made // n)
    return walk([(i, min(m, i + height)) for i in range(0, m, height)], x.device)


def _sweeping(
    f: Callable[..., None], leaf: Leaf | None, flat: Sequence[bool], fixed: tuple[Hashable, ...]
) -> Kernel:
    downs, both = (len(leaf.down), len(leaf.down) + len(leaf.across)) if leaf else (0, 0)
    read = leaf.read if leaf else None

    def run(*tensors: Tensor) -> None:
        matrix = () if read is None else (read(tensors[:downs], tensors[downs:both]),)
        rest = tensors[both:]
        rows = [v[:, 0] if one else v for v, one in zip(rest, flat, strict=False)]
        f(*matrix, *rows, *rest[len(flat) :], *fixed)

    return run


def _reading(leaf: Leaf) -> Kernel:
    downs, read = len(leaf.down), leaf.read

    def run(*tensors: Tensor) -> None:
        tensors[-1].copy_(read(tensors[:downs], tensors[downs:-1]))

    return run
