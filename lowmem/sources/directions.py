"""Random directions of parameter space: known by name, held nowhere.

Element i of a parameter's part of a direction is a hash of i under keys mixed
from (seed, step, evaluation, parameter's name): both probes and the update draw
the same numbers, whatever is drawn before them, in what pieces and where.
Signs have the smaller variance and are far cheaper, 32 of them to a word; Gaussian
numbers are the paper's. Pieces are whole cells of some elements, so that a logarithm takes
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
from lowmem.optim.engine.compiling.kernel import Kernel, compiled
from lowmem.optim.engine.cutting import read_flat, sizes, write_flat
from lowmem.optim.terms.products import HALF

log = logging.getLogger(__name__)

CELL = 1 << 8
"""Pieces start and end on its multiples."""


def pieces(start: int, stop: int, device: torch.device, *, fixed: bool) -> Iterator[tuple[int, int]]:
    """Whole cells that cover start..stop as (first element, size); none crosses a multiple of 2^32.

    Args:
        start, stop: elements; device: where they live.
        fixed: sizes of the device's policy alone, for compiled code.

    Example:
        >>> list(pieces(5000, 70_000, torch.device("cpu"), fixed=True))
        [(4096, 65536), (69632, 4096)]
        >>> list(pieces(5000, 6000, torch.device("cpu"), fixed=False))
        [(4864, 1280)]
    """
    drawn = sizes(device).drawn
    cell = drawn[-1] if fixed else CELL
    at = start // cell * cell
    while at < stop:
        room = (1 << 32) - at % (1 << 32)
        left = min(-(-(stop - at) // cell) * cell, room)
        size = next(s for s in drawn if s <= left) if fixed else min(left, drawn[0])
        yield at, size
        at += size


@dataclass(frozen=True)
class Perturbation:
    """One direction z, each of its elements independent of the others.

    Args:
        noise: rademacher or gaussian.
        name: of the evaluation: seed, step, index of the micro-batch, index of the direction.
        compile: compile what draws (it may change the last bit of a Gaussian number).
    """

    noise: str
    name: tuple[int, ...]
    compile: bool = False

    def pen(self, parameter: str, like: Tensor, scale: float = 1.0) -> Pen:
        """What writes scale z for a parameter.

        Args:
            parameter: its name.
            like: the weight, not displaced; structured directions look at its shape or its values.
            scale: factor of z.
        """
        return Pen(self, parameter, like, scale)

    def draw(self, parameter: str, like: Tensor, start: int, stop: int, scale: float = 1.0) -> Tensor:
        """Elements start..stop of scale z for a parameter, flat fp32."""
        return self.pen(parameter, like, scale).draw(start, stop)

    def displaced(self, parameter: str, w: Tensor, distance: float, start: int = 0) -> Tensor:
        """A copy of a weight, distance along z, in its dtype and layout; the elements from `start` on."""
        out, end = torch.empty_like(w), start + w.numel()
        pen = self.pen(parameter, w, distance)
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


class Pen:
    """Writes pieces of scale z for one parameter.

    Args:
        z: the direction; parameter: its name; like: the weight, not displaced; scale: factor of z.
    """

    def __init__(self, z: Perturbation, parameter: str, like: Tensor, scale: float) -> None:
        self.noise, self.device, self.compile = z.noise, like.device, z.compile
        self.name: tuple[int | str, ...] = ("direction", *z.name, parameter)
        self.factor = torch.full((), scale, dtype=torch.float32, device=self.device)
        self._keys: dict[int, Tensor] = {}

    def draw(self, start: int, stop: int) -> Tensor:
        """Elements start..stop, flat fp32, new memory at each call."""
        cells = list(pieces(start, stop, self.device, fixed=self.compile))
        first = cells[0][0] if cells else start
        out = torch.empty(sum(size for _, size in cells), device=self.device)
        for at, size in cells:
            self.fill(out[at - first : at - first + size], None, at)
        return out[start - first : stop - first]

    def gradient(self, start: int, stop: int) -> Tensor:
        """What elements start..stop are stepped by: scale z itself."""
        return self.draw(start, stop)

    def keys(self, at: int) -> Tensor:
        """Those of z and of the rounding; the upper half of a 64-bit index is part of the name."""
        upper = at >> 32
        if upper not in self._keys:
            uses = ("z", "angle", "rounding")
            self._keys[upper] = noise.key_tensor([(*self.name, upper, use) for use in uses], self.device)
        return self._keys[upper]

    def fill(self, out: Tensor, w: Tensor | None, at: int) -> None:
        """Write scale z, or w + scale z; the first element has the index `at`."""
        position = torch.full((), wrapped(at), dtype=torch.int32, device=self.device)
        live = self.compile and self.device.type != "meta"
        run = _kernel(self.noise, None if w is None else w.dtype, out.numel(), self.device, live)
        run(out, w, position, self.keys(at), self.factor)


def wrapped(index: int) -> int:
    """The lower 32 bits of an index, as int32 has them."""
    low = index & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low


def numbers(kind: str, position: Tensor, size: int, keys: Tensor) -> Tensor:
    """Noise of `size` elements, flat fp32.

    Args:
        kind: rademacher (32 signs to a word, so the size and the position are multiples of 32) or gaussian.
        position: 0-D int32, index of the first element; keys: (2 or more, 2) int32.
    """
    device = position.device
    if kind == "gaussian":
        index = torch.arange(size, dtype=torch.int32, device=device) + position
        return noise.normal(index, keys[0], keys[1])
    first = (position >> 5) & 0x7FFFFFF
    words = noise.bits(torch.arange(size >> 5, dtype=torch.int32, device=device) + first, keys[0])
    places = torch.arange(32, dtype=torch.int32, device=device)
    return (2 * ((words.unsqueeze(1) >> places) & 1) - 1).view(-1).float()


def displace(out: Tensor, w: Tensor, shift: Tensor, position: Tensor, key: Tensor) -> None:
    """Write w + shift, a 16-bit result rounded at random under the key."""
    x = w.to(torch.promote_types(w.dtype, torch.float32)) + shift
    if out.dtype in HALF:
        index = torch.arange(out.shape[0], dtype=torch.int32, device=out.device) + position
        x = noise.round_stochastic(x, out.dtype, noise.bits(index, key))
    out.copy_(x)


def _body(kind: str) -> Kernel:
    def run(out: Tensor, w: Tensor | None, position: Tensor, keys: Tensor, factor: Tensor) -> None:
        x = numbers(kind, position, out.shape[0], keys) * factor
        if w is None:
            out.copy_(x)
        else:
            displace(out, w, x, position, keys[2])

    return run


@functools.lru_cache(maxsize=256)
def _kernel(kind: str, dtype: torch.dtype | None, size: int, device: torch.device, live: bool) -> Kernel:
    """What fills one piece; compiled for exactly these arguments."""
    body = _body(kind)
    if not live:
        return body
    log.info("compiling what draws %s noise for %d elements", kind, size)
    return compiled(body)
