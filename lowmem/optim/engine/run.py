"""One tensor's pass through the frame: pieces of weight, gradient and state, handed to the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowmem.optim.blocks import Direction
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine.compiling import Kernel
from lowmem.optim.engine.cutting import pad, read_flat, sizes, write_flat
from lowmem.optim.engine.finite import Skipped
from lowmem.optim.engine.kernels import Asks, Guard
from lowmem.optim.engine.layout import layout
from lowmem.optim.engine.passes import once
from lowmem.optim.formulas import Leaf
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State
from lowmem.optim.writers import Writer


class Kernels(Protocol):
    """Who makes kernels, and keeps what they are given again and again; see `Chunks`."""

    def compiles(self, rule: Pointwise | None) -> bool: ...

    @property
    def skipped(self) -> Skipped: ...

    def true(self, device: torch.device) -> Tensor: ...

    def grid(self, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]: ...

    def kernel(
        self, rule: Pointwise | None, writer: Writer | None, keys: Sequence[str], w: Tensor, g: Tensor,
        live: bool, guard: Guard, asks: Asks, counts: bool, together: bool = False,
        leaf: Leaf | None = None, read: Sequence[Tensor] = (), order: tuple[int, ...] = (),
    ) -> Kernel: ...  # fmt: skip


class Pass:
    """One tensor's pass through the frame: what is the same for all of its chunks.

    Args:
        frame: whose kernels run.
        rule, writer: what the kernel does; s, extra: their states.
        hp: of this step; rates: lr and decay, (2,).
        ok: 0-D bool; guard: what it says, see `kernels.Guard`; asks: what for, see `kernels.Asks`.
        table: the scalars of all ages, where the age has not been moved.
    """

    def __init__(
        self, frame: Kernels, rule: Pointwise | None, writer: Writer | None, s: State, extra: State,
        hp: Hyper, rates: Tensor, ok: Tensor, guard: Guard, asks: Asks = "step",
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.frame, self.rule, self.writer, self.hp = frame, rule, writer, hp
        self.rates, self.ok, self.guard, self.asks = rates, ok, guard, asks
        self.device = rates.device
        self.layout = layout(rule, writer, s, extra, frame.compiles(rule))
        self.live = self.layout.live and self.device.type != "meta"
        self.counts = table is not None
        self.scalars = rule.scalars(s, hp) if rule and table is None else table
        self._words: dict[int, Tensor] = {}

    @property
    def any_rows(self) -> bool:
        """Whether a chunk may have rows of any length: all goes by single elements."""
        parts = [
            *(self.rule.per.values() if self.rule else ()),
            *(self.writer.per.values() if self.writer else ()),
        ]
        grain = max(x.grain for x in (self.rule, self.writer) if x)
        return grain == 1 and {0, 1}.issuperset(parts) and not (self.writer and self.writer.beside)

    def act(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Step or measure the weight's elements start..start+len(g), padded to size."""
        (self.measure if self.asks == "sums" else self.step_weight)(p, g, start, size)

    def rows(self, p: Tensor, shape: tuple[int, int], leaf: Leaf, i: int, j: int) -> None:
        """Step or measure rows i..j of a weight of this shape, by what the kernel itself reads of a leaf."""
        n = shape[1]
        views, _ = self.layout.cut(i * n, (j - i) * n, (j - i) * n, n)
        (w, *read), order = once([p.view(shape)[i:j], *leaf.rows(i, j)])
        self._call(w, read, i * n, views, leaf, order)

    def step_weight(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Step the weight's elements start..start+len(g), padded to size."""
        length = g.numel()
        w = read_flat(p, start, length)
        if length == size and p.is_contiguous():
            self._launch(w, g, start, length)
            return
        padded = pad(w, size)
        self._launch(padded, g if length == size else pad(g, size), start, length)
        write_flat(p, start, padded[:length])

    def measure(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Sum over the elements start..start+len(g); weight and gradient stay as they are."""
        length = g.numel()
        w = p.flat(start, start + length) if isinstance(p, Int8Weight) else read_flat(p, start, length)
        if length == size and p.is_contiguous():
            self._launch(w, g, start, length)
        else:
            self._launch(pad(w, size), pad(g, size, math.nan), start, length)

    def step_low(self, low: Tensor, start: int, size: int) -> None:
        """Overwrite a piece of the projected gradient by its direction."""
        if low.numel() == size:
            self._launch(low, low, start, size)
            return
        padded = pad(low, size, math.nan if self.asks == "both" else 0.0)  # nobody measures the padding
        self._launch(padded, padded, start, low.numel())
        low.copy_(padded[: low.numel()])

    def _launch(self, w: Tensor, g: Tensor, start: int, length: int) -> None:
        """Pass the kernel on flat elements, of which the first `length` are the tensor's from `start` on."""
        size = g.shape[0]
        width = self.layout.width(size)
        shaped = g.view(-1, width)
        weight = shaped if w is g else w.view(-1, width)
        views, back = self.layout.cut(start, length, size)
        self._call(weight, [shaped], start, views)
        for piece, padded in back:
            piece.copy_(padded[: piece.shape[0]])

    def _call(
        self, w: Tensor, read: list[Tensor], start: int, views: Sequence[Tensor], leaf: Leaf | None = None,
        order: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Call the kernel on a weight as rows, and on the gradient or what it is read from."""
        kernel = self.frame.kernel(
            self.rule, self.writer, self.layout.keys, w, (w, *read)[-1], self.live,
            self.guard, self.asks, self.counts, False, leaf, read, order,
        )  # fmt: skip
        kernel(
            w, *read, self.rates, self.ok, self._skipped(w.shape[0]), self.scalars,
            *self._places(start, *w.shape), self._keys(start), *views,
        )  # fmt: skip

    def _skipped(self, rows: int) -> Tensor | None:
        """What counts elements that are not stepped: on a card by rows, or it would take a kernel more."""
        if self.writer is None:
            return None
        by_rows = self.frame.compiles(self.rule) and not sizes(self.device).at_hand
        skipped = self.frame.skipped
        return skipped.tally(rows, self.device) if by_rows else skipped.counter(self.device)

    def _places(self, start: int, rows: int, width: int) -> tuple[Tensor | None, ...]:
        """Where elements are in the tensor: the chunk, its rows, and the columns in a row."""
        if not self.layout.placed:
            return None, None, None
        index = (start + self.hp.offset) & 0xFFFFFFFF
        signed = index - (1 << 32) if index >= 1 << 31 else index
        return self.hp.vector(signed, dtype=torch.int32)[0], *self.frame.grid(rows, width, self.device)

    def _keys(self, start: int) -> Tensor | None:
        """Keys of the random streams; the upper half of a 64-bit element index is part of the name."""
        if not self.layout.streams:
            return None
        upper = (start + self.hp.offset) >> 32
        if upper not in self._words:
            self._words[upper] = self.hp.keys(self.layout.streams, upper)
        return self._words[upper]


def precision(p: Tensor) -> torch.dtype:
    """What a weight's step is computed in."""
    return torch.promote_types(p.dtype, torch.float32)


def rates(hp: Hyper, direction: Direction, dtype: torch.dtype = torch.float32) -> Tensor:
    """lr and decay as (2,) on the device; a direction may bring its own."""
    group = hp.rates(direction.scale, dtype)
    if direction.lr is None and direction.decay is None:
        return group
    lr = group[0] if direction.lr is None else direction.lr * direction.scale
    decay = group[1] if direction.decay is None else direction.decay
    return torch.stack((lr.to(dtype), decay.to(dtype)))
