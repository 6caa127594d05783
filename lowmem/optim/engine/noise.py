"""Random numbers that depend on what they are for, not on when they are drawn.

A stream is named by (run seed, step, parameter, use). Its name is mixed on the
host into two 32-bit words; element i of the stream is

    h(h(i ^ k0) ^ k1)

with h a bijection of the 32-bit integers. No generator is advanced, so resume,
replicas, chunking, placement and the order of parameters change nothing, and
the arithmetic fuses into the kernel that uses it. Two rounds with two words are
needed: with one, the keys k and k ^ 1 give the same numbers with neighbours
swapped. Integers are int32 and wrap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 1 << 32
PIECE = 1 << 20
"""Numbers that are drawn at a time."""


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD >> 1 else word


def mix(*name: int | str) -> tuple[int, int]:
    """Two signed 32-bit words from the name of a stream.

    >>> mix(0, "weight") == mix(0, "weight")
    True
    """
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little"))


def scramble(x: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on every input bit."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def bits(index: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each int32 index; key: (2,) int32."""
    return scramble(scramble(index ^ key[0]) ^ key[1])


def positions(start: int, count: int, device: torch.device) -> Tensor:
    """Global element indices start..start+count as wrapped int32."""
    base = _signed(start % _WORD)
    return torch.arange(count, dtype=torch.int32, device=device) + base


def uniform(word: Tensor) -> Tensor:
    """Uniform in (0, 1) from 32 bits; never 0, so its logarithm is finite."""
    return ((word >> 8) & 0xFFFFFF).float() * 2.0**-24 + 2.0**-25


def normal(index: Tensor, key: Tensor, other: Tensor) -> Tensor:
    """Standard normal numbers by Box-Muller from two streams of bits."""
    radius = (-2.0 * uniform(bits(index, key)).log()).sqrt()
    return radius * (2.0 * math.pi * uniform(bits(index, other))).cos()


def signs(index: Tensor, key: Tensor) -> Tensor:
    """Plus or minus one, as fp32."""
    return ((bits(index, key) >> 30) & 2).float() - 1.0


def key_tensor(names: Sequence[tuple[int | str, ...]], device: torch.device) -> Tensor:
    """Keys of several streams, (len(names), 2) int32."""
    words = torch.tensor([mix(*name) for name in names], dtype=torch.int32)
    return words.reshape(len(names), 2).to(device, non_blocking=True)


def gaussian(shape: tuple[int, int], device: torch.device, *name: int | str) -> Tensor:
    """A standard normal fp32 matrix that depends on its name and shape alone."""
    keys = key_tensor(radius_and_angle(*name), device)
    drawn = torch.empty(shape, device=device)
    first, height = starts(shape, device), max(1, PIECE // max(1, shape[1]))
    # piece by piece: what Box-Muller needs on the way is several times what it gives
    for i in range(0, shape[0], height):
        normal_(drawn[i : i + height], first[i : i + height], keys)
    return drawn


def radius_and_angle(*name: int | str) -> list[tuple[int | str, ...]]:
    """The names of the two streams that normal numbers are made of."""
    return [(*name, "radius"), (*name, "angle")]


def starts(shape: tuple[int, int], device: torch.device) -> Tensor:
    """The index of the first element of each row, (m,) int32; it wraps."""
    return torch.arange(shape[0], dtype=torch.int32, device=device) * shape[1]


def normal_(rows: Tensor, first: Tensor, keys: Tensor) -> None:
    """Fill rows with standard normal numbers.

    Args:
        rows: (h, n) fp32; first: indices of their first elements, (h,) int32; keys: of two streams, (2, 2).
    """
    places = first[:, None] + torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    rows.copy_(normal(places, keys[0], keys[1]))


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest 16-bit number (ties to even) as fp32.

    In integer arithmetic for bf16, because a compiler may drop a cast to bf16 and
    back as if it did nothing.

    Args:
        x: fp32; Inf and NaN pass through.
        dtype: torch.bfloat16 or torch.float16.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype).float()
    word = x.view(torch.int32)
    even = (word >> 16) & 1
    rounded = ((word + 0x7FFF + even) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


def round_stochastic(x: Tensor, dtype: torch.dtype, word: Tensor) -> Tensor:
    """Round fp32 to a 16-bit dtype, up or down so that the mean is x.

    The bits below the kept mantissa are the probability of rounding away from
    zero. Values that fit are unchanged; Inf and NaN pass through.

    Args:
        x: fp32.
        dtype: torch.bfloat16 or torch.float16.
        word: int32 random bits, like x.
    """
    if dtype == torch.bfloat16:
        rounded = ((x.view(torch.int32) + (word & 0xFFFF)) & -0x10000).view(torch.float32)
    else:
        rounded = ((x.view(torch.int32) + (word & 0x1FFF)) & -0x2000).view(torch.float32)
        # below 2^-14 the spacing of fp16 is constant, and fp32 mantissa bits no longer tell it
        small = torch.floor(x * 2.0**24 + (word & 0xFFFF).float() * 2.0**-16) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, small, rounded)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)
