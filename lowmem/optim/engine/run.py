"""One tensor's pass through the frame: pieces of weight, gradient and state, handed to the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.optim.blocks import Dense, Direction
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine.compiling.kernel import Compiled, Kernel
from lowmem.optim.engine.cutting import Span, pad, read_flat, sizes, write_flat
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

    def again(self, hp: Hyper, rates: Tensor, scalars: Tensor | None) -> None:
        """The same of another step: what its numbers are, or its table."""
        self.hp, self.rates, self.scalars = hp, rates, scalars

    def forget(self) -> None:
        """Hold nothing of a step that is over: the weight may be in other memory by the next one."""
        self.hp = None  # type: ignore[assignment]
        self._words.clear()

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
        kernel(*self.given(w, read, start, views))

    def given(self, w: Tensor, read: Sequence[Tensor], start: int, views: Sequence[Tensor]) -> list[Any]:
        """What a kernel is called with: weight, gradient, what is known of the step, views of the state."""
        return [
            w, *read, self.rates, self.ok, self._skipped(w.shape[0]), self.scalars,
            *self._places(start, *w.shape), self._keys(start), *views,
        ]  # fmt: skip

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


class Course:
    """The launches of a tensor's step, kept from one step to the next.

    What a step asks of Python and torch around a kernel takes as long as the kernel itself, for most
    tensors of a model. Where a contiguous gradient steps a contiguous weight in the same pieces again, all
    but the gradient and the numbers of the step is found once.

    Args:
        run: the pass that has been taken; p: over this weight; g: by this gradient; spans: in these pieces.
    """

    def __init__(self, run: Pass, p: Tensor, g: Tensor, spans: Sequence[Span]) -> None:
        self._run, self._policy, self._dtypes = run, sizes(p.device), (p.dtype, g.dtype)
        self._ages = len(run.scalars) if run.counts and run.scalars is not None else None
        self._launches: list[tuple[int, int, int, Sequence[Tensor], Kernel]] = []
        for start, length, size in spans:
            width = run.layout.width(size)
            views, _ = run.layout.cut(start, length, size)
            w, read = (x.view(-1)[start : start + size].view(-1, width) for x in (p, g))
            kernel = run.frame.kernel(
                run.rule, run.writer, run.layout.keys, w, read, True, run.guard, run.asks, run.counts
            )
            if isinstance(kernel, Compiled):
                kernel = kernel.fitting(*run.given(w, [read], start, views))
            self._launches.append((start, size // width, width, views, kernel))
        run.forget()

    @staticmethod
    def serves(run: Pass, p: Tensor, g: Dense) -> bool:
        """Whether nothing but the gradient and numbers changes: no cast, no sums, no part of a tensor."""
        rule, writer = run.rule, run.writer
        if not (run.live and rule and writer) or rule.measures or writer.beside or run.hp.shard:
            return False
        return not g.takes and p.is_contiguous() and not isinstance(p, Int8Weight)

    def fits(self, rule: Pointwise, writer: Writer, p: Tensor, g: Dense, table: Tensor | None) -> bool:
        """Whether a step has the same launches; a table that has grown is read by other kernels."""
        run = self._run
        same = run.rule is rule and run.writer is writer and self._policy is sizes(p.device)
        if not same or g.takes or not p.is_contiguous() or (p.dtype, g.tensor.dtype) != self._dtypes:
            return False
        return (None if table is None else len(table)) == self._ages

    def step(self, p: Tensor, g: Dense, hp: Hyper, rates: Tensor, scalars: Tensor | None) -> None:
        """Take the step."""
        run, w, read = self._run, p.view(-1), g.tensor.view(-1)
        run.again(hp, rates, scalars)
        for start, rows, width, views, launch in self._launches:
            here = slice(start, start + rows * width)
            launch(*run.given(w[here].view(rows, width), [read[here].view(rows, width)], start, views))
        run.forget()


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
