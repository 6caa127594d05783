"""What the CUDA caching allocator reserves for a stream of allocations, and what it does at the limit.

The rules are those of torch's native allocator (c10/cuda/CUDACachingAllocator): sizes are rounded to 512
bytes; up to 1 MiB comes from 2 MiB segments of a small pool; below 10 MiB from segments of 20 MiB; larger
requests get a segment rounded to 2 MiB. The smallest free block that fits is used (lowest address first)
and split when enough remains; freed neighbours coalesce; segments are kept for later. When the device
refuses a new segment, every wholly free one is returned and the request repeated: a "retry", which costs
time and synchronises. If that fails as well, the run is out of memory.

One stream and one device, `expandable_segments` off (the default). Nothing else on the device is modelled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
SMALL_LIMIT, SMALL_SEGMENT = MIB, 2 * MIB
MEDIUM_LIMIT, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
GRAIN, LARGE_ROUND = 512, 2 * MIB
FITS, RETRIES, OUT = "fits", "fits with retries", "out of memory"


class OutOfMemoryError(Exception):
    """The simulated device refused a segment after a retry."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment; neighbours form a list."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


@dataclass
class Allocator:
    """A caching allocator without memory.

    Args:
        capacity: bytes the device gives to segments; None for no limit.

    Example:
        >>> a = Allocator()
        >>> block = a.malloc(3 * MIB)
        >>> a.reserved // MIB, a.allocated // MIB
        (20, 3)
    """

    capacity: int | None = None
    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    retries: int = 0
    _next: int = 0
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _blocks: dict[int, Block] = field(default_factory=dict)

    def malloc(self, size: int) -> Block:
        """A block of at least `size` bytes.

        Raises:
            OutOfMemoryError: beyond the capacity, after a retry.
        """
        size = max(GRAIN, -(-size // GRAIN) * GRAIN)
        small = size <= SMALL_LIMIT
        block = self._best_fit(size, small) or self._segment(size, small)
        remaining = block.size - size
        if remaining >= GRAIN if small else remaining > SMALL_LIMIT:
            self._split(block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool, joined with free neighbours."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.free:
            self._take(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(block)

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        if at == len(pool):
            return None
        block = self._blocks[pool[at][1]]
        self._take(block)
        return block

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            wanted = SMALL_SEGMENT
        elif size < MEDIUM_LIMIT:
            wanted = MEDIUM_SEGMENT
        else:
            wanted = -(-size // LARGE_ROUND) * LARGE_ROUND
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.retries += 1
            self._release_cached()
            if self.reserved + wanted > self.capacity:
                raise OutOfMemoryError(f"{wanted} bytes beyond {self.capacity}")
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(self._next, wanted, small)
        self._next += 2 * wanted  # a gap: segments never coalesce
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        block.size = size
        self._put(rest)

    def _release_cached(self) -> None:
        for pool in self._free.values():
            for _, address in list(pool):
                block = self._blocks[address]
                if block.before is None and block.after is None:
                    self._take(block)
                    self.reserved -= block.size

    def _put(self, block: Block) -> None:
        block.free = True
        self._blocks[block.address] = block
        insort(self._free[block.small], (block.size, block.address))

    def _take(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._blocks[block.address]
        block.free = False


@dataclass(frozen=True)
class Verdict:
    """What a simulated run came to.

    Args:
        reserved: greatest bytes held in segments.
        allocated: greatest bytes in blocks, rounding included.
        retries: how often the device refused and cached segments had to be returned.
        fits: False where the run is out of memory.
    """

    reserved: int
    allocated: int
    retries: int
    fits: bool

    @property
    def word(self) -> str:
        """fits, fits with retries, or out of memory."""
        if not self.fits:
            return OUT
        return RETRIES if self.retries else FITS


def simulate(
    stream: Sequence[int],
    sizes: Sequence[int],
    start: int,
    state: Iterable[int],
    scratch: Sequence[tuple[int, int]],
    *,
    capacity: int | None = None,
    steps: int = 3,
    after: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Verdict:
    """Replay a traced step several times with an optimizer's state and scratch.

    Args:
        stream: id + 1 at a birth, -(id + 1) at a death (see `trace.Tracker`).
        sizes: bytes by id.
        start: entries before it happen once (weights, inputs), the rest every step.
        state: bytes of each state tensor; they appear at the end of the first step.
        scratch: (place in the stream, bytes) of the optimizer's transient memory, ascending.
        capacity: bytes the device gives to segments.
        steps: repetitions; what lives at the end of a step is freed before the next.
        after: a stream and its sizes, replayed once the steps are done.
    """
    allocator = Allocator(capacity)
    held: dict[int, Block] = {}
    try:
        _replay(allocator, stream[:start], sizes, held, 0, ())
        for step in range(steps):
            living: dict[int, Block] = {}
            _replay(allocator, stream[start:], sizes, living, start, scratch)
            if step == 0:
                for size in state:
                    allocator.malloc(size)
            for block in living.values():
                allocator.free(block)
        _replay(allocator, after[0], after[1], {}, 0, ())
    except OutOfMemoryError:
        return Verdict(allocator.peak_reserved, allocator.peak_allocated, allocator.retries, False)
    return Verdict(allocator.peak_reserved, allocator.peak_allocated, allocator.retries, True)


def _replay(
    allocator: Allocator,
    entries: Sequence[int],
    sizes: Sequence[int],
    held: dict[int, Block],
    base: int,
    scratch: Sequence[tuple[int, int]],
) -> None:
    waiting = list(reversed(scratch))
    for place, entry in enumerate(entries, base):
        while waiting and waiting[-1][0] <= place:
            _transient(allocator, waiting.pop()[1])
        if entry > 0:
            held[entry] = allocator.malloc(sizes[entry - 1])
        elif -entry in held:
            allocator.free(held.pop(-entry))
    for _, size in reversed(waiting):
        _transient(allocator, size)


def _transient(allocator: Allocator, size: int) -> None:
    if size:
        allocator.free(allocator.malloc(size))
