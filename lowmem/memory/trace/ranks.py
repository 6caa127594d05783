"""What one of several cards holds of a step that was traced on one.

    full    FSDP2 as accelerate wraps a model: each decoder layer is a unit, the embedding another; what is
            left, the head and its norm, is the tail, whole on every card from forward to the end of backward
    none    DDP: each card holds everything, and a copy of the gradients in buckets

Weights and gradients become the rows of the first rank, padded to ceil(m / ranks) as FSDP2 pads them. What
is gathered is bounded from above, by units u (padded bytes) and the tail t:

    gather = max(3 max u, t + max u)            one runs, one is copied out, the next is on its way
           + 2 max (gradients of a unit)        in backward: as they are made, and as they are exchanged
           + all gradients of the micro-batches before, which no exchange has divided yet

Same bytes in every layer, so that two shallow models still tell a deep one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lowmem.memory.run import Run
from lowmem.memory.trace import trainable
from lowmem.memory.trace.tracker import Tracker
from lowmem.memory.trace.windows import Parameter
from lowmem.optim.shards import Shard

TAIL, GATHER, BUCKETS = "unsharded", "gather", "buckets"
ROWS = (TAIL, GATHER, BUCKETS)
"""Rows of a plan for several ranks, beside those of one."""
_Wanted = tuple[int, int | None, str, int]
AFTER = ("clip", "optimizer step")
"""Phases in which nothing is gathered."""


@dataclass(frozen=True)
class Rows:
    """Tensors whose rows ranks share: (rows, bytes of a row, whether it is trained) each."""

    tensors: tuple[tuple[int, int, bool], ...] = ()

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> Rows:
        """Those of parameters."""
        return cls(tuple((*rows_of(p), p.requires_grad) for p in params))

    def held(self, ranks: int, trained: bool = False) -> int:
        """Bytes on the first rank, of all or of the trained ones."""
        return sum(-(-m // ranks) * row for m, row, trains in self.tensors if trains or not trained)

    def whole(self, ranks: int, trained: bool = False) -> int:
        """Bytes of what is gathered from all ranks."""
        return ranks * self.held(ranks, trained)


@dataclass(frozen=True)
class Units:
    """The parameters of a model as they are gathered.

    Args:
        layer: of the largest decoder layer; embedding: where it is a unit of its own.
        tail: what is left; all: of the whole model.
    """

    layer: Rows
    embedding: Rows
    tail: Rows
    all: Rows


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many rows a tensor has, and the bytes of one."""
    m = x.shape[0] if x.dim() else 1
    return m, x.numel() // max(1, m) * x.element_size()


def units(model: nn.Module) -> Units:
    """The units of a model.

    Args:
        model: a transformers model, or one with adapters.
    """
    layers = [Rows.of(layer.parameters()) for layer in trainable.decoder_layers(model)]
    inside = {id(p) for layer in trainable.decoder_layers(model) for p in layer.parameters()}
    left = [p for p in model.parameters() if id(p) not in inside]
    table, head = (
        getattr(getattr(model, f"get_{side}_embeddings", lambda: None)(), "weight", None)
        for side in ("input", "output")
    )
    alone = [p for p in left if p is table and table is not head]
    rest = [p for p in left if not any(p is own for own in alone)]
    largest = max(layers, key=lambda rows: rows.whole(1))
    return Units(largest, Rows.of(alone), Rows.of(rest), Rows.of(model.parameters()))


def gathered(found: Units, ranks: int) -> int:
    """Bytes of weights that are gathered at once beside the tail, at most."""
    unit, tail = max(u.whole(ranks) for u in (found.layer, found.embedding)), found.tail.whole(ranks)
    return max(3 * unit, tail + unit)


def exchanged(found: Units, run: Run) -> int:
    """Bytes of gradients in backward beside this rank's rows of them, at most."""
    parts = (found.layer, found.embedding, found.tail)
    carried = found.all.whole(run.ranks, trained=True) if run.accumulation > 1 else 0
    return carried + 2 * max(unit.whole(run.ranks, trained=True) for unit in parts)


def held(tracker: Tracker, found: Units, run: Run) -> tuple[Tracker, Sequence[int]]:
    """The storages of the first of several ranks.

    Args:
        tracker: of the step on one card; found: the units of its model; run: with its ranks.

    Returns:
        The tracker, and where each place of the given stream went.
    """
    starts = {name: start for start, name in reversed(tracker.phases)}
    backward = starts.get("loss backward")
    begin, stop = tracker.phases[0][0], min([starts[n] for n in AFTER if n in starts] or [_end(tracker)])
    if not run.sharded:
        every = found.all.whole(1, trained=True)
        buckets = [(backward, None, BUCKETS, every)] if backward is not None else []
        return _with(tracker, buckets, list(tracker.sizes))
    wanted: list[_Wanted] = [
        (begin, stop, TAIL, found.tail.whole(run.ranks)),
        (begin, stop, GATHER, gathered(found, run.ranks)),
    ]
    if backward is not None:
        wanted.append((backward, stop, GATHER, exchanged(found, run)))
    elif "evaluation" not in starts:  # a probe displaces the rows themselves, and puts them back from a copy
        wanted.append((begin, stop, "workspace", found.all.held(run.ranks)))
    return _with(tracker, wanted, [_own(tracker, i, run.ranks) for i in range(len(tracker.sizes))])


def _end(tracker: Tracker) -> int:
    return len(tracker.stream)


def _own(tracker: Tracker, index: int, ranks: int) -> int:
    """Bytes of a storage here."""
    if index not in tracker.rows:
        return tracker.sizes[index]
    m, row = tracker.rows[index]
    return -(-math.ceil(m / ranks) * row // tracker.granularity) * tracker.granularity


def _with(tracker: Tracker, wanted: Sequence[_Wanted], sizes: list[int]) -> tuple[Tracker, Sequence[int]]:
    """A tracker with further storages: (birth, death or None, category, bytes) each."""
    made, grain = tracker.emptied(), tracker.granularity
    made.sizes = sizes
    births: dict[int, list[int]] = {}
    deaths: dict[int, list[int]] = {}
    for birth, death, category, size in wanted:
        if size == 0:
            continue
        made.sizes.append(-(-size // grain) * grain)
        made.categories.append(category)
        births.setdefault(birth, []).append(len(made.sizes))
        if death is not None:
            deaths.setdefault(death, []).append(-len(made.sizes))
    places = []
    for at in range(_end(tracker) + 1):  # a death precedes what begins at its place, a birth follows
        made.stream += deaths.get(at, [])
        places.append(len(made.stream))
        made.stream += births.get(at, [])
        made.stream += tracker.stream[at : at + 1]
    made.phases = [(places[start], name) for start, name in tracker.phases]
    return made, places


def sharded(params: Iterable[Parameter], ranks: int) -> tuple[Parameter, ...]:
    """Parameters as the first rank holds them."""
    return tuple(replace(p, shard=Shard.of(p.shape, ranks, 0) if p.shape else None) for p in params)
