"""Live bytes of a training step, storage by storage.

A dispatch mode sees every tensor that an operation returns. The first time a storage appears its bytes are
added, and a weak reference takes them off again when it is freed; views and in-place results share a storage
and cost nothing. The same tracker watches a real run (`profile`) and one on fake tensors without weights
(`plan`): what differs is only where the tensors live.

The tracker records a stream of births and deaths and does the arithmetic afterwards, because what a tensor
*is* is often known late: a gradient is recognised when its hook fires, and counts as one from birth.

What happens inside a kernel (a workspace of cuBLAS, the scratch of a sort) is invisible here; see `gpus`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Scratch = Callable[[Any, Any], tuple[Tensor, ...]]
DEVICE = torch.ops.prim.device.default
"""What half of all calls under fake tensors ask for: it makes no tensor, and needs no other mode."""
CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Moment:
    """One instant: live bytes by category, in the phase `event`; `at` is its place in the stream."""

    event: str
    bytes: Mapping[str, int]
    at: int

    @property
    def total(self) -> int:
        """Sum over the categories."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Gradient:
    """A gradient as it becomes whole.

    Args:
        name: of its parameter; storages: that hold it, by the tracker's index.
        at: its place in the stream; phases: how many had begun.
    """

    name: str
    storages: tuple[int, ...]
    at: int
    phases: int


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that hold a tensor: one, or those inside a wrapper subclass (quantized, sharded)."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    else:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else ()
        for part in parts:
            yield part.untyped_storage()


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records when each storage is born and freed.

    Args:
        granularity: bytes to which each storage is rounded up: 512 as the CUDA allocator does, 1 on a CPU.
        scratch: (operation, its arguments) -> what its kernel allocates beside what it returns.

    Storages that exist beforehand are `register`ed; `enter(phase, category)` says where the run is and what
    new storages count as until `claim` says better.

    Example:
        tracker = Tracker()
        tracker.register(model.parameters(), "weights")
        with tracker:
            tracker.enter("forward")
            loss = model(x).sum()
        print(tracker.peak().total)
    """

    def __init__(self, granularity: int = 1, scratch: Scratch | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity = granularity
        self.scratch = scratch
        self.sizes: list[int] = []
        self.categories: list[str] = []
        self.stream: list[int] = []  # id + 1 at a birth, -(id + 1) at a death
        self.phases: list[tuple[int, str]] = []
        self.rows: dict[int, tuple[int, int]] = {}  # rows that ranks may share, and the bytes of one
        self.live = 0
        self._category = "activations"
        self._ids: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}

    @property
    def phase(self) -> str:
        """Where the run is."""
        return self.phases[-1][1] if self.phases else "start"

    def enter(self, phase: str, category: str = "activations") -> None:
        """Begin a phase; storages born in it count as `category`."""
        self.phases.append((len(self.stream), phase))
        self._category = category

    def register(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count storages that exist already; one seen before keeps its place and changes category."""
        for tensor in tensors:
            self.claim(tensor, category)

    def claim(self, tensor: Tensor, category: str) -> tuple[int, ...]:
        """Say what a storage is, for its whole life; returns its index, or those of a tensor's parts."""
        seen = tuple(index for storage in storages(tensor) if (index := self._see(storage)) is not None)
        for index in seen:
            self.categories[index] = category
        return seen

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Note that ranks may share the rows of these."""
        for tensor in tensors:
            rows = tensor.shape[0] if tensor.dim() else 1
            for storage in storages(tensor):
                if (index := self._see(storage)) is not None:
                    self.rows[index] = rows, tensor.numel() // rows * tensor.element_size()

    def _see(self, storage: torch.UntypedStorage) -> int | None:
        key = storage._cdata
        if key in self._ids:
            return self._ids[key]
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        if size == 0:
            return None
        index = len(self.sizes)
        self.sizes.append(size)
        self.categories.append(self._category)
        self.stream.append(index + 1)
        self.live += size
        self._ids[key] = index
        # The address is reused after a death; a late callback must not free its successor: hence the index.
        self._refs[index] = weakref.ref(storage, lambda _: self._free(key, index))
        return index

    def _free(self, key: int, index: int) -> None:
        if self._refs.pop(index, None) is None:
            return
        self.stream.append(-index - 1)
        self.live -= self.sizes[index]
        if self._ids.get(key) == index:
            del self._ids[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        inside = () if self.scratch is None else self.scratch(func, args)
        for x in inside:
            self._see(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    self._see(storage)
        return out

    def stop(self) -> None:
        """Forget the storages that still live, so that later frees are not recorded."""
        self._refs.clear()
        self._ids.clear()

    def emptied(self) -> Tracker:
        """One that knows the same storages, for another order of births and deaths."""
        made = Tracker(self.granularity)
        made.sizes, made.categories, made.rows = list(self.sizes), list(self.categories), dict(self.rows)
        made.live = self.live
        return made

    def moments(self) -> dict[str, Moment]:
        """The largest instant of each phase, in order of first appearance."""
        return peaks(self.stream, self.sizes, self.categories, self.phases)

    def peak(self) -> Moment:
        """The largest instant of all; the first of equals."""
        return max(self.moments().values(), key=lambda moment: (moment.total, -moment.at))

    def at(self, positions: Sequence[int]) -> list[Moment]:
        """Live bytes by category at given, ascending places of the stream."""
        live = dict.fromkeys(CATEGORIES, 0)
        found: list[Moment] = []
        start = 0
        for position in positions:
            _apply(live, self.stream[start:position], self.sizes, self.categories)
            found.append(Moment("", dict(live), position))
            start = position
        return found


def _apply(live: dict[str, int], entries: Sequence[int], sizes: Sequence[int], kinds: Sequence[str]) -> None:
    for entry in entries:
        index = abs(entry) - 1
        live[kinds[index]] = live.get(kinds[index], 0) + (sizes[index] if entry > 0 else -sizes[index])


def peaks(
    stream: Sequence[int], sizes: Sequence[int], categories: Sequence[str], phases: Sequence[tuple[int, str]]
) -> dict[str, Moment]:
    """Replay a stream: the largest instant of each phase (phases of one name are one)."""
    live = dict.fromkeys(CATEGORIES, 0)
    best: dict[str, Moment] = {}
    bounds = [*[start for start, _ in phases[1:]], len(stream)]
    if phases:
        _apply(live, stream[: phases[0][0]], sizes, categories)
    for (start, name), stop in zip(phases, bounds, strict=True):
        where = _highest(stream, start, stop, sizes)
        _apply(live, stream[start:where], sizes, categories)
        if name not in best or sum(live.values()) > best[name].total:
            best[name] = Moment(name, dict(live), where)
        _apply(live, stream[where:stop], sizes, categories)
    return best


def _highest(stream: Sequence[int], start: int, stop: int, sizes: Sequence[int]) -> int:
    """Where in start..stop most bytes live: after how many entries."""
    total = top = 0
    where = start
    for position in range(start, stop):
        entry = stream[position]
        total += sizes[entry - 1] if entry > 0 else -sizes[-entry - 1]
        if total > top:
            top, where = total, position + 1
    return where
