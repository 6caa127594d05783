"""How much of a tensor is taken at a time, on each kind of device; cutting tensors, and putting pieces back.

On a CPU a piece should stay in cache. On a card it should be the whole tensor, as every
launch costs as much as a million elements; what limits it there is the memory that is
made on the way. So sizes are a policy of the device (`Sizes`), found by the device's type
or named for a while (`policy`): a card is planned for, and its policy tested, without one.
Weights and states are the same bits under every policy. Eager sums over a matrix go by row
blocks of one size everywhere, for the order of their terms decides the last bit.

Pieces are ranges of the row-major elements of a tensor. Where the layout allows
it a piece is a view; otherwise it is a copy that must be written back. State
tensors have one entry for `per` elements along their first dimension.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

LADDER = (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12)
"""Chunk sizes in elements; every grain divides the smallest."""

MOST = 1 << 30
"""Elements of a piece, at most: generated code counts in 32 bits, and keys are named by the upper half."""

Block = TypeVar("Block")
Span = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """How much is taken at a time on one kind of device.

    Args:
        ladder: elements of compiled pieces, largest first; empty for all of a tensor in one piece.
        eager: most elements of a piece that is not compiled. Its temporaries take up to 36 bytes for each.
        made: bytes that may be made at once of a step to be written, such as a lifted product, where the
            writer is compiled; made_eager: where it is not. 0 for those of a piece alone.
        passes: fewest elements of a matrix whose passes are compiled; smaller ones go block by block.
        drawn: elements of pieces of noise, largest first; few, as each takes a second or two to compile.
        together: tensors with fewer elements step together; 0 for none.
        at_hand: what a tensor holds can be read on the host without waiting, and uploads are free.
    """

    ladder: tuple[int, ...]
    eager: int
    made: int
    made_eager: int
    passes: int
    drawn: tuple[int, ...]
    together: int
    at_hand: bool

    def look(self, takes: int, compiled: bool) -> int:
        """Elements that may be made at once where each takes so many bytes; 0 for those of a piece alone."""
        return (self.made if compiled else self.made_eager) // takes if takes else 0


POLICIES = {
    "cpu": Sizes(
        LADDER, eager=LADDER[0], made=8 << 20, made_eager=0, passes=1 << 18, drawn=(1 << 16, 1 << 12),
        together=0, at_hand=True,
    ),
    "cuda": Sizes(
        (), eager=LADDER[0], made=48 << 20, made_eager=8 << 20, passes=0,
        drawn=(1 << 20, 1 << 16, 1 << 12), together=1 << 18, at_hand=False,
    ),
}  # fmt: skip
"""By type of device; other accelerators are like CUDA, and meta is like the CPU until one is named."""

_CPU, _CUDA = POLICIES["cpu"], POLICIES["cuda"]
_named: ContextVar[str] = ContextVar("policy", default="")


def sizes(device: torch.device) -> Sizes:
    """The policy of a device, unless another one is named.

    >>> sizes(torch.device("cpu")).at_hand, sizes(torch.device("cuda")).at_hand
    (True, False)
    """
    if name := _named.get():
        return POLICIES[name]
    return _CPU if device.type in ("cpu", "meta") else _CUDA


@contextmanager
def policy(name: str) -> Iterator[None]:
    """Step everything by this policy, whatever the device: to plan for a card, or to test what it does.

    >>> with policy("cuda"):
    ...     sizes(torch.device("cpu")).at_hand
    False
    """
    token = _named.set(name if name in POLICIES else "")
    try:
        yield
    finally:
        _named.reset(token)


def spans(count: int) -> Iterator[Span]:
    """Cut `count` elements into (start, length, size), size from the ladder, the last one padded.

    >>> list(spans(70_000))
    [(0, 65536, 65536), (65536, 4096, 4096), (69632, 368, 4096)]
    """
    start = 0
    for size in LADDER:
        while count - start >= size:
            yield start, size, size
            start += size
    if start < count:
        yield start, count - start, LADDER[-1]


@functools.lru_cache(1 << 12)
def compiled_spans(count: int) -> tuple[Span, ...]:
    """`spans`, the last million elements in one piece where they are a multiple of the smallest size.

    >>> compiled_spans(73_728)
    ((0, 73728, 73728),)
    """
    whole = count // LADDER[0] * LADDER[0]
    rest = count - whole
    if rest and rest % LADDER[-1] == 0:  # one call is cheaper than a walk down the ladder
        return (*spans(whole), (whole, rest, rest))
    return tuple(spans(count))


@functools.lru_cache(1 << 12)
def whole_spans(count: int, width: int, most: int = MOST) -> tuple[Span, ...]:
    """As few pieces as possible, of whole rows; what does not fill a row comes padded, at the end.

    No piece has one row alone: a compiler would take that as another kernel.

    Args:
        count: elements; width: of a row; most: elements of a piece.

    >>> whole_spans(70_000, 256), whole_spans(300, 256)
    (((0, 69888, 69888), (69888, 112, 512)), ((0, 300, 512),))
    """
    full = count // width * width if count >= 2 * width else 0
    most = most // width * width
    starts = range(0, full, most)
    cut = [(i, n, n) for i in starts for n in (min(most, full - i),)]
    if cut and cut[-1][1] == width:  # one row is left over
        cut[-1] = (cut[-1][0], width, 2 * width)
    return (*cut, (full, count - full, 2 * width)) if count > full else tuple(cut)


@functools.lru_cache(1 << 12)
def eager_spans(count: int, most: int, grain: int) -> tuple[Span, ...]:
    """Cut into (start, length, size) of at most `most` elements, the last size padded to the grain.

    >>> eager_spans(600, 256, 64)
    ((0, 256, 256), (256, 256, 256), (512, 88, 128))
    """
    starts = range(0, count, most)
    return tuple((i, n, -(-n // grain) * grain) for i in starts for n in (min(most, count - i),))


def look_ranges(count: int, n: int, most: int, width: int) -> list[tuple[int, int]]:
    """Flat ranges of at most so many elements: whole rows of n where that is a multiple of the width.

    >>> look_ranges(3000, 512, 1100, 256), look_ranges(1000, 300, 600, 256)
    ([(0, 1024), (1024, 2048), (2048, 3000)], [(0, 512), (512, 1000)])
    """
    step = most // n * n if n <= most else most
    step = max(width, step // width * width)
    return [(i, min(count, i + step)) for i in range(0, count, step)]


def pieces(tensor: Tensor, per: int, start: int, length: int) -> Tensor:
    """The entries of a state tensor that belong to elements start..start+length."""
    flat = tensor.view(-1) if per == 1 else tensor
    first, last = start // per, -(-(start + length) // per)
    return flat if first == 0 and last >= flat.shape[0] else flat[first:last]


def pad(piece: Tensor, entries: int, fill: float = 0) -> Tensor:
    """A copy with entries of `fill` appended along dim 0."""
    padded = piece.new_full((entries, *piece.shape[1:]), fill)
    padded[: piece.shape[0]] = piece
    return padded


def walk(blocks: Iterable[Block], device: torch.device) -> Iterable[Block]:
    """All blocks; on meta, where only sizes are asked, the first two and the last stand for all."""
    if device.type != "meta":
        return blocks
    rest = iter(blocks)
    return [*itertools.islice(rest, 2), *collections.deque(rest, maxlen=1)]


def write_flat(tensor: Tensor, start: int, values: Tensor) -> None:
    """Store flat elements into a tensor of any layout."""
    if tensor.is_contiguous():
        tensor.view(-1)[start : start + values.numel()] = values
        return
    if tensor.dim() == 1:
        tensor[start : start + values.numel()] = values
        return
    matrix = tensor.flatten(1) if tensor.dim() > 2 else tensor
    n = matrix.shape[1]
    first, last = start // n, -(-(start + values.numel()) // n)
    rows = matrix[first:last].reshape(-1)
    rows[start - first * n : start - first * n + values.numel()] = values
    tensor[first:last] = rows.view(last - first, *tensor.shape[1:])


def read_flat(tensor: Tensor, start: int, length: int) -> Tensor:
    """Flat elements of a tensor of any layout: a view where that is possible."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start : start + length]
    n = tensor[0].numel()
    first, last = start // n, -(-(start + length) // n)
    return tensor[first:last].reshape(-1)[start - first * n :][:length]
