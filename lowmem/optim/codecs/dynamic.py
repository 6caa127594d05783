"""The dynamic map of 8-bit and 4-bit codes (arXiv 2110.02861), and how its nearest entry is found.

Entries lie dense near zero and far apart near 1, so that numbers over seven decades
have a code. The nearest one is found without a search: two small tables, made once
for each device, hold where to start and what to compare with.
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


@functools.cache
def dynamic_tables(bits: int, signed: bool, device: torch.device) -> Mapping[str, Tensor]:
    """The map, its rounding thresholds, and for 8 bits a start for the search.

    `below[h]` counts the thresholds under every fp32 whose upper 16 bits are h;
    at most one more lies among them, so one comparison finishes the search. Every
    optimizer on a device uses the same tensors.
    """
    table = dynamic_map(bits, signed)
    edges = _thresholds(table)
    tables = {"map": table, "thresholds": torch.cat([edges, torch.tensor([math.inf])])}
    if bits == 8:
        words = torch.arange(1 << 16, dtype=torch.int32) << 16
        least = torch.where(words < 0, words | 0xFFFF, words).view(torch.float32)
        count = torch.searchsorted(edges, least.nan_to_num(nan=0.0), right=True)
        tables["below"] = count.clamp(max=255).to(torch.int16)
    return {key: table.to(device) for key, table in tables.items()}
