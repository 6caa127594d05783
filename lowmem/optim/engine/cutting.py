"""Cutting tensors into flat pieces, and putting pieces back.

Pieces are ranges of the row-major elements of a tensor. Where the layout allows
it a piece is a view; otherwise it is a copy that must be written back. State
tensors have one entry for `per` elements along their first dimension.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

LADDER = (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12)
"""Chunk sizes in elements; every grain divides the smallest."""

Block = TypeVar("Block")
Span = tuple[int, int, int]


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
def eager_spans(count: int, most: int, grain: int) -> tuple[Span, ...]:
    """Cut into (start, length, size) of at most `most` elements, the last size padded to the grain.

    >>> eager_spans(600, 256, 64)
    ((0, 256, 256), (256, 256, 256), (512, 88, 128))
    """
    starts = range(0, count, most)
    return tuple((i, n, -(-n // grain) * grain) for i in starts for n in (min(most, count - i),))


def pieces(tensor: Tensor, per: int, start: int, length: int) -> Tensor:
    """The entries of a state tensor that belong to elements start..start+length."""
    flat = tensor.view(-1) if per == 1 else tensor
    first, last = start // per, -(-(start + length) // per)
    return flat if first == 0 and last >= flat.shape[0] else flat[first:last]


def pad(piece: Tensor, entries: int, fill: int = 0) -> Tensor:
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
