"""Directions with momentum: noise mixed with what was stepped along before (ZO-AdaMU, arXiv 2312.15184).

    n1 = sqrt(a) z1,    n2 = m + sqrt(1 - a) z2,    d = b1 n1 + (1 - b1) n2
    c = (L(w + eps d) - L(w - eps d)) / (2 eps)
    v = b2 n1^2 + (1 - b2) n2^2,    G = c d / sqrt(v + 1e-8),    m <- sign(c) d

For the first steps a = b1 = b2 = 1: the direction is noise and the step its sign. Then
they fall by a cosine each, over four fifths of the run, and stay. This is the paper's
text; its code mixes one direction for the probe and another for the step, and lets
three schedules eat one horizon. d is not isotropic: the mean of c d is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowmem.optim.engine.cutting import pad, read_flat, write_flat
from lowmem.optim.source import Query
from lowmem.optim.terms.state import State
from lowmem.sources.directions import Pen, Perturbation, numbers, pieces
from lowmem.sources.structures import Free, Structured

SIGMA = 1e-8
SPEEDS = (1.0, 0.1, 1.5)
"""How fast a, b1 and b2 fall."""


@dataclass(frozen=True)
class Mixed(Free):
    """Noise, and more and more of the direction before.

    Holds one number for each weight, in the weight's dtype.

    Args:
        total: steps of the run.
    """

    total: int = 20_000
    on_rows: ClassVar[bool] = False  # elements follow from the mean as well, which is not held by index
    holds: ClassVar[bool] = True

    def init(self, x: Tensor) -> State:
        """A mean of zero."""
        return {"mean": torch.zeros(x.shape, dtype=x.dtype, device=x.device)}

    def share(self, step: int, speed: float) -> float:
        """a, b1 or b2 of a step: 1 at first, then half a cosine, then its last value.

        Example:
            >>> mixed = Mixed(1000)
            >>> mixed.share(0, 1.0), round(mixed.share(425, 0.1), 3), round(mixed.share(999, 1.5), 3)
            (1.0, 0.685, 0.0)
        """
        first, last = min(1024, self.total // 20), self.total * 4 // 5
        if step < first or last <= first:
            return 1.0
        done, length = min(step, last) - first, last - first
        horizon = max(length, self.total - speed * (self.total - last) * done / length)
        return 0.5 * (1.0 + math.cos(math.pi * done / horizon))

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """Mixed with what is held now."""
        name = (query.seed, query.step, query.index, k)
        shares = tuple(self.share(query.step, speed) for speed in SPEEDS)
        return MixedDirection(noise, name, query.compile, shares, query.held)

    def settle_(self, name: str, p: nn.Parameter, slopes: Sequence[tuple[float, Perturbation]]) -> None:
        """m <- sign(c) d, the mean over directions; as it was where a slope is not finite."""
        if not p.numel() or not all(math.isfinite(c) for c, _ in slopes):
            return
        mean = cast("MixedDirection", slopes[0][1]).held[name]["mean"]
        signs = [(math.copysign(1.0, c) if c else 0.0) / len(slopes) for c, _ in slopes]
        pens = [z.pen(name, p.detach(), sign) for sign, (_, z) in zip(signs, slopes, strict=True)]
        for at, size in pieces(0, p.numel(), p.device, fixed=False):
            stop = min(at + size, p.numel())
            new = torch.stack([pen.draw(at, stop) for pen in pens]).sum(0)
            write_flat(mean, at, new.to(mean.dtype))


@dataclass(frozen=True)
class MixedDirection(Perturbation):
    """A direction with momentum.

    Args:
        shares: a, b1, b2; held: the means, by the names of tensors, zero where there is none.
    """

    shares: tuple[float, ...] = (1.0, 1.0, 1.0)
    held: Mapping[str, State] = field(default_factory=dict, compare=False, repr=False)

    def pen(self, parameter: str, like: Tensor, scale: float = 1.0) -> Pen:
        """What writes it for one tensor."""
        return _MixedPen(self, parameter, like, scale)


class _MixedPen(Structured):
    def __init__(self, z: MixedDirection, parameter: str, like: Tensor, scale: float) -> None:
        super().__init__(z, parameter, like, scale)
        self.shares, self.normalised = z.shares, False
        self._other = Pen(Perturbation(z.noise, (*z.name, 1)), parameter, like, 1.0)
        none = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
        self._mean = z.held.get(parameter, {}).get("mean", none)  # nothing is held of an empty tensor

    def values(self, at: int, size: int, position: Tensor) -> Tensor:
        a, b1, b2 = self.shares
        length = max(0, min(size, self.like.numel() - at))
        fresh = numbers(self.noise, position, size, self.keys(at)) * a**0.5
        other = numbers(self.noise, position, size, self._other.keys(at)) * (1 - a) ** 0.5
        other += pad(read_flat(self._mean, at, length), size)
        mixed: Tensor = b1 * fresh + (1 - b1) * other
        if self.normalised:
            mixed /= (b2 * fresh.square() + (1 - b2) * other.square() + SIGMA).sqrt()
        return mixed

    def gradient(self, start: int, stop: int) -> Tensor:
        """Over the root of the second moment."""
        self.normalised = True
        try:
            return self.draw(start, stop)
        finally:
            self.normalised = False
