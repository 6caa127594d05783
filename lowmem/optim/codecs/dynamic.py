"""The dynamic map of 8-bit and 4-bit codes (arXiv 2110.02861), and how its nearest entry is found.

Entries lie dense near zero and far apart near 1, so that numbers over seven decades
have a code. The nearest one is found without a search and without a comparison: one
small table, made once for each device, says it for the upper half of every fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor


def dynamic_map(bits: int, signed: bool) -> Tensor:
    """The sorted entries of the dynamic map in [-1, 1], or the linear 4-bit map k / 16.

    One decade of the exponent after the other, each with half the linear
    entries of the one above; 0 and 1 are added.
    """
    if bits == 4 and not signed:
        return torch.arange(1, 17) / 16.0
    decades = bits - 1
    values = [0.0, 1.0]
    for i in range(decades):
        cells = 2 ** (i + bits - 1 - decades) if signed else 2 ** (i + bits - decades)
        edges = torch.linspace(0.1, 1.0, cells + 1)
        middles = (10.0 ** (i - decades + 1)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    return torch.tensor(sorted(values))


def _thresholds(table: Tensor) -> Tensor:
    """The least fp32 y that rounds to entry k + 1 or above: y - map[k] >= (map[k+1] - map[k]) / 2."""
    low, high = table[:-1], table[1:]
    half = (high - low) * 0.5
    y = low + half
    for direction in (-math.inf, math.inf):
        for _ in range(4):
            moved = torch.nextafter(y, torch.tensor(direction))
            keep = (moved - low >= half) if direction < 0 else (y - low < half)
            y = torch.where(keep, moved, y)
    return y


def ordered(x: Tensor) -> Tensor:
    """Words in the order of the fp32 numbers that they hold, int32; 0 for 0, and -1 for -0."""
    word = x.view(torch.int32)
    return (word >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(word)


def nearest_code(y: Tensor, sums: Tensor) -> Tensor:
    """The entry of a map that is nearest to y in [-1, 1]; halfway goes up.

    Numbers whose words share their upper half have one threshold among them at most. `sums`
    holds 65536 times the entry below it, and what the lower half lacks to reach the next one.
    """
    word = ordered(y)
    del y  # of a chunk's size, as the others
    found = torch.nn.functional.embedding((word >> 16).bitwise_and_(0x7FFF), sums)[..., 0]
    return found.add_(word.bitwise_and_(0xFFFF)).bitwise_right_shift_(16)


def _sums(edges: Tensor) -> Tensor:
    """The table of `nearest_code` for these thresholds, (32768, 1) int32: the numbers in [-1, 1] and more."""
    upper = torch.arange(1 << 15, dtype=torch.int32)
    upper = torch.where(upper < 1 << 14, upper, upper - (1 << 15))
    words = ordered(edges)
    below = torch.searchsorted(words, upper << 16, right=True).to(torch.int32)
    next_one = torch.cat([words, words.new_tensor([torch.iinfo(torch.int32).max])])[below]
    lacks = torch.where(next_one >> 16 == upper, (1 << 16) - (next_one & 0xFFFF), 0)
    return ((below << 16) + lacks)[:, None]


@functools.cache
def dynamic_tables(bits: int, signed: bool, device: torch.device) -> Mapping[str, Tensor]:
    """The map, and `sums`, which finds its nearest entry: made once for each device."""
    table = dynamic_map(bits, signed)
    return {"map": table.to(device), "sums": _sums(_thresholds(table)).to(device)}
