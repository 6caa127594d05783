"""Random directions of parameter space: known by name, held nowhere.

Element i of a parameter's part of a direction is a hash of i under keys mixed
from (seed, step, evaluation, parameter's name): both probes and the update draw
the same numbers, whatever is drawn before them, in what pieces and where.
Signs have the smaller variance and are three times cheaper; Gaussian numbers are
the paper's. Pieces are whole cells of some elements, so that a logarithm takes
the same path through the code whatever the cutting.

A displaced weight w + eps z is rounded at random with the right mean: near 1 the
spacing of bf16 is 8 eps, and to nearest norm weights would not move at all. Both
probes take the same random bits, so that what rounding adds mostly cancels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.engine import noise
from lowmem.optim.engine.cutting import read_flat, write_flat
from lowmem.optim.engine.kernels import Kernel, compiled
from lowmem.optim.writers import HALF

log = logging.getLogger(__name__)

CELL = 1 << 8
"""Pieces start and end on its multiples."""

SIZES = (1 << 20, 1 << 16, 1 << 12)
"""Elements of a piece; few sizes, because each takes a second or two to compile."""


def pieces(start: int, stop: int, device: torch.device, *, fixed: bool) -> Iterator[tuple[int, int]]:
    """Whole cells that cover start..stop as (first element, size); none crosses a multiple of 2^32.

    Args:
        start, stop: elements; device: where they live.
        fixed: sizes from the list alone, for compiled code.

    Example:
        >>> list(pieces(5000, 70_000, torch.device("cpu"), fixed=True))
        [(4096, 65536), (69632, 4096)]
        >>> list(pieces(5000, 6000, torch.device("cpu"), fixed=False))
        [(4864, 1280)]
    """
    sizes = SIZES[1:] if device.type == "cpu" else SIZES  # where a launch costs more than a cache saves
    cell = SIZES[-1] if fixed else CELL
    at = start // cell * cell
    while at < stop:
        room = (1 << 32) - at % (1 << 32)
        left = min(-(-(stop - at) // cell) * cell, room)
        size = next(s for s in sizes if s <= left) if fixed else min(left, sizes[0])
        yield at, size
        at += size


@dataclass(frozen=True)
class Direction:
    """One direction z.

    Args:
        noise: rademacher or gaussian.
        name: of the evaluation: seed, step, index of the micro-batch, index of the direction.
        compile: compile what draws (it may change the last bit of a Gaussian number).
    """

    noise: str
    name: tuple[int, ...]
    compile: bool = False

    def draw(self, parameter: str, start: int, stop: int, device: torch.device, scale: float = 1.0) -> Tensor:
        """Elements start..stop of scale z for a parameter, flat fp32."""
        cells = list(pieces(start, stop, device, fixed=self.compile))
        first = cells[0][0] if cells else start
        out = torch.empty(sum(size for _, size in cells), device=device)
        pen = _Pen(self, parameter, device, scale)
        for at, size in cells:
            pen.fill(out[at - first : at - first + size], None, at)
        return out[start - first : stop - first]

    def displaced(self, parameter: str, w: Tensor, distance: float, start: int = 0) -> Tensor:
        """A copy w + distance z of a weight in its own dtype and layout; of its elements from `start` on."""
        out, end = torch.empty_like(w), start + w.numel()
        pen = _Pen(self, parameter, w.device, distance)
        for at, size in pieces(start, end, w.device, fixed=self.compile):
            first, last = max(at, start), min(at + size, end)
            old = read_flat(w, first - start, last - first)
            if last - first == size and w.is_contiguous():
                pen.fill(out.view(-1)[at - start : at - start + size], old, at)
                continue
            new = torch.empty(size, dtype=w.dtype, device=w.device)
            padded = torch.nn.functional.pad(old, (first - at, at + size - last))
            pen.fill(new, padded, at)
            write_flat(out, first - start, new[first - at : last - at])
        return out


class _Pen:
    """Writes pieces of scale z for one parameter."""

    def __init__(self, z: Direction, parameter: str, device: torch.device, scale: float) -> None:
        self.noise, self.device = z.noise, device
        self.live = z.compile and device.type != "meta"
        self.name: tuple[int | str, ...] = ("direction", *z.name, parameter)
        self.factor = torch.full((), scale, dtype=torch.float32, device=device)
        self._keys: dict[int, Tensor] = {}

    def keys(self, at: int) -> Tensor:
        """Those of z and of the rounding; the upper half of a 64-bit index is part of the name."""
        upper = at >> 32
        if upper not in self._keys:
            uses = ("z", "angle", "rounding")
            self._keys[upper] = noise.key_tensor([(*self.name, upper, use) for use in uses], self.device)
        return self._keys[upper]

    def fill(self, out: Tensor, w: Tensor | None, at: int) -> None:
        """Write scale z, or w + scale z; the first element has the index `at`."""
        low = at & 0xFFFFFFFF
        signed = low - (1 << 32) if low >= 1 << 31 else low
        position = torch.full((), signed, dtype=torch.int32, device=self.device)
        run = _kernel(self.noise, None if w is None else w.dtype, out.numel(), self.device, self.live)
        run(out, w, position, self.keys(at), self.factor)


def _body(kind: str, half: bool) -> Kernel:
    def run(out: Tensor, w: Tensor | None, position: Tensor, keys: Tensor, factor: Tensor) -> None:
        index = torch.arange(out.shape[0], dtype=torch.int32, device=out.device) + position
        z = noise.signs(index, keys[0]) if kind == "rademacher" else noise.normal(index, keys[0], keys[1])
        x = z * factor
        if w is not None:
            x = w.to(torch.promote_types(w.dtype, torch.float32)) + x
        if half:
            x = noise.round_stochastic(x, out.dtype, noise.bits(index, keys[2]))
        out.copy_(x)

    return run


@functools.lru_cache(maxsize=256)
def _kernel(kind: str, dtype: torch.dtype | None, size: int, device: torch.device, live: bool) -> Kernel:
    """What fills one piece; compiled for exactly these arguments."""
    body = _body(kind, dtype in HALF)
    if not live:
        return body
    log.info("compiling what draws %s noise for %d elements", kind, size)
    return compiled(body)
