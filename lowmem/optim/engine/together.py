"""Small tensors stepped together: a model has hundreds, and each launch costs as much as a large one.

Norms, biases and adapters of one rule, writer, dtype and parameter group wait until enough of them
are there. Their weights, gradients and states are then put one below the other, row by row, and
stepped by one call of the kernel that steps one of them: what differs from tensor to tensor (the
numbers of its age, the keys of its random streams, where its elements begin) is given for each row.
Then everything goes back to where it is held. So states stay what they are, and so do their bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.engine.layout import ROW
from lowmem.optim.engine.run import Kernels
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State
from lowmem.optim.writers import Writer

ELEMENTS = {True: 1 << 21, False: 1 << 20}
"""Of all that step together, at most, compiled or not: copies and temporaries fit the workspace of a step."""
TENSORS = 512
"""That step together, at most."""


@dataclass(frozen=True)
class Small:
    """One tensor that waits: weight and gradient, flat; the states of rule and writer; its step."""

    p: Tensor
    g: Tensor
    s: State
    extra: State
    hp: Hyper


@dataclass(frozen=True)
class Rows:
    """Where the rows of some tensors are.

    Args:
        counts: rows of each tensor; owner: of each row, (rows,) int64.
        first: element of its tensor that a row begins with, (rows, 1) int32; column: places in a row.
        start: 0.
    """

    counts: tuple[int, ...]
    owner: Tensor
    first: Tensor
    column: Tensor
    start: Tensor

    @classmethod
    def of(cls, counts: tuple[int, ...], width: int, device: torch.device) -> Rows:
        """Found once for tensors of these sizes."""
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        first = torch.cat([torch.arange(n, dtype=torch.int32) * width for n in counts])
        column = torch.arange(width, dtype=torch.int32)
        start = torch.zeros((), dtype=torch.int32)
        return cls(counts, *(x.to(device) for x in (owner, first[:, None], column, start)))

    def spread(self, x: Tensor) -> Tensor:
        """What each tensor has, (tensors, ...), for each of its rows: (..., rows, 1)."""
        return x.index_select(0, self.owner).movedim(0, -1).contiguous()[..., None]


@dataclass
class Group:
    """Those that wait for one kernel."""

    rule: Pointwise
    writer: Writer
    most: int
    waiting: list[Small] = field(default_factory=list)
    elements: int = 0

    def has_room(self, count: int) -> bool:
        """Whether a tensor of so many elements may still join."""
        return self.elements + count <= self.most and len(self.waiting) < TENSORS

    def join(self, one: Small) -> None:
        """Wait."""
        self.waiting.append(one)
        self.elements += len(one.g)

    def leave(self) -> list[Small]:
        """All that have waited."""
        waiting, self.waiting, self.elements = self.waiting, [], 0
        return waiting


class Together:
    """Those that wait, and the frame that steps them."""

    def __init__(self, frame: Kernels) -> None:
        self.frame = frame
        self.open = False
        self._groups: dict[tuple[Hashable, ...], Group] = {}
        self._rows: dict[tuple[Hashable, ...], Rows] = {}
        self._pads: dict[tuple[Hashable, ...], Tensor] = {}

    def takes(
        self, rule: Pointwise, writer: Writer, p: Tensor, g: Blocks, s: State, extra: State, hp: Hyper
    ) -> bool:
        """Whether a tensor waits from now on; if not, it is to be stepped by itself."""
        limit = sizes(p.device).together if self.open else 0
        if not (limit and p.numel() < limit and p.is_contiguous() and not g.takes):
            return False
        if hp.shard or writer.beside or not (hp.group and rule.joins(s)):  # rows of shards begin elsewhere
            return False
        flat = g.chunk(0, p.numel())
        key = (id(rule), id(writer), p.dtype, flat.dtype, p.device, id(hp.group))
        group = self._groups.setdefault(key, Group(rule, writer, ELEMENTS[self.frame.compiles(rule)]))
        if not group.has_room(len(flat)):
            self._step(group)
        group.join(Small(p.view(-1), flat, s, extra, hp))
        return True

    @property
    def waits(self) -> bool:
        """Whether any tensor is left, as after an error."""
        return any(group.waiting for group in self._groups.values())

    def flush(self) -> None:
        """Step all that wait."""
        for group in self._groups.values():
            self._step(group)
        self._groups.clear()

    def _step(self, group: Group) -> None:
        """One step of all that wait in a group."""
        rule, waiting = group.rule, group.leave()
        rows = self._rows_of(waiting, rule.grain if rule.grain > 1 else ROW)
        w, g = (self._gathered(flat, rows, 1) for flat in ([x.p for x in waiting], [x.g for x in waiting]))
        states = self._states(rule, waiting, rows)
        self._launch(rule, group.writer, waiting, rows, w, g, [view for _, view, _ in states])
        _scatter([one.p for one in waiting], w, rows, 1)
        for tensors, view, per in states:
            if per:
                _scatter(tensors, view, rows, per)

    def _states(
        self, rule: Pointwise, waiting: Sequence[Small], rows: Rows
    ) -> list[tuple[list[Tensor], Tensor, int]]:
        """Of each key, the tensors, what the kernel sees, and elements for each entry; 0: seen whole."""
        found = []
        for key in waiting[0].s:
            tensors, per = [one.s[key] for one in waiting], rule.per.get(key, 0)
            seen = self._gathered(tensors, rows, per, rule.fill.get(key, 0)) if per else tensors[0]
            found.append((tensors, seen, per))
        for key in waiting[0].extra:
            tensors = [one.extra[key] for one in waiting]
            found.append((tensors, self._gathered(tensors, rows, 1), 1))
        return found

    def _launch(
        self, rule: Pointwise, writer: Writer, waiting: Sequence[Small], rows: Rows, w: Tensor, g: Tensor,
        views: Sequence[Tensor],
    ) -> None:  # fmt: skip
        frame = self.frame
        live, streams = frame.compiles(rule) and w.device.type != "meta", rule.streams + writer.streams
        kernel = frame.kernel(
            rule, writer, tuple(waiting[0].s), w, g, live, "elements", "step", False, True
        )  # fmt: skip
        keys = torch.stack([one.hp.keys(streams) for one in waiting]) if streams else None
        kernel(
            w, g, waiting[0].hp.rates(dtype=torch.promote_types(w.dtype, torch.float32)),
            frame.true(w.device), frame.skipped.counter(w.device), self._scalars(rule, waiting, rows),
            *((rows.start, rows.first, rows.column) if streams else (None, None, None)),
            None if keys is None else rows.spread(keys), *views,
        )  # fmt: skip

    def _scalars(self, rule: Pointwise, waiting: Sequence[Small], rows: Rows) -> Tensor | None:
        """The rule's numbers for each row; ages move on the way."""
        hp, s = waiting[0].hp, waiting[0].s
        table = rule.table(s, hp) if "age" in s else None
        if table is None:
            return rule.scalars(s, hp)
        ages = [one.s["age"] for one in waiting]
        torch._foreach_add_(ages, 1)
        return rows.spread(table.index_select(0, torch.stack(ages)))

    def _gathered(self, tensors: Sequence[Tensor], rows: Rows, per: int, fill: float = 0) -> Tensor:
        """Tensors with an entry for each `per` elements, as (rows, entries of a row), last rows filled."""
        width = len(rows.column) // per
        parts = []
        for tensor, count in zip(tensors, rows.counts, strict=True):
            parts.append(tensor.view(-1))
            if short := count * width - tensor.numel():
                parts.append(self._pad(tensor, width, fill)[:short])
        return torch.cat(parts).view(-1, width)

    def _pad(self, like: Tensor, width: int, fill: float) -> Tensor:
        key = (like.dtype, like.device, width, fill)
        if key not in self._pads:
            self._pads[key] = like.new_full((width,), fill)
        return self._pads[key]

    def _rows_of(self, waiting: Sequence[Small], width: int) -> Rows:
        counts, device = tuple(-(-len(one.g) // width) for one in waiting), waiting[0].g.device
        if (counts, width, device) not in self._rows:
            if len(self._rows) > 64:
                self._rows.clear()
            self._rows[counts, width, device] = Rows.of(counts, width, device)
        return self._rows[counts, width, device]


def _scatter(tensors: Sequence[Tensor], gathered: Tensor, rows: Rows, per: int) -> None:
    """Store what was gathered where it came from."""
    flat, width = gathered.view(-1), len(rows.column) // per
    starts = itertools.accumulate((n * width for n in rows.counts), initial=0)
    pieces = [flat[i : i + tensor.numel()] for i, tensor in zip(starts, tensors, strict=False)]
    torch._foreach_copy_([tensor.view(-1) for tensor in tensors], pieces)
