"""SMMF: both moments as outer products of two vectors, and signs (arXiv 2412.08894).

    M <- b1 M + (1 - b1) G,  b1 = beta1 growth_rate^(t - 1);  V <- b2 V + (1 - b2) G^2,  b2 = 1 - t^decay_rate
    D = M / (sqrt(V) + eps),  from M and V before they are held again

The elements are seen as a matrix that is as square as their number allows, whatever the shape of
the tensor: (rows, columns) with rows columns = N and columns the largest divisor of N that is no larger
than its root. Of M, its signs are held, one bit each, and |M| like V by its row and column sums r and c,
r c' / sum(c), which is exact where the matrix has rank one. Published code holds a byte for a sign.

The gradient is looked at four times: its largest element, the sums, the step, the signs. The old signs
are read while the step is written, so that the new ones are stored after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import BLOCK, Blocks, Direction
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.engine.cutting import walk
from lowmem.optim.terms.fp32 import LARGEST_MEAN, LEAST_EPS, TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State, scoped


@functools.lru_cache(1 << 12)
def square(count: int) -> tuple[int, int]:
    """The most square (rows, columns) of so many elements, rows first.

    >>> square(4096 * 11008), square(4097), square(7)
    ((8192, 5504), (241, 17), (7, 1))
    """
    columns = next((i for i in range(math.isqrt(count), 0, -1) if count % i == 0), 1)
    return count // columns, columns


def packed(positive: Tensor) -> Tensor:
    """Booleans as bits, the first in the lowest; (k,) to (ceil(k / 8),) uint8."""
    bits = torch.zeros(-(-positive.numel() // 8) * 8, dtype=torch.uint8, device=positive.device)
    bits[: positive.numel()] = positive
    places = torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def signs(bits: Tensor, start: int, stop: int) -> Tensor:
    """Elements start..stop as 1 and -1, fp32: the inverse of `packed`."""
    first = start // 8
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[first : -(-stop // 8), None] >> places) & 1).view(-1)
    return flat[start - first * 8 : stop - first * 8].float().mul_(2.0).sub_(1.0)


def outer(held: State, start: int, stop: int) -> Tensor:
    """Flat elements start..stop of r c'."""
    width = held["col"].numel()
    first = start // width
    rows = held["row"][first : -(-stop // width), None] * held["col"]
    return rows.view(-1)[start - first * width : stop - first * width]


class Moved(Blocks):
    """An (m, n) matrix given by a function of a flat range."""

    def __init__(self, shape: tuple[int, int], f: Callable[[int, int], Tensor], device: torch.device) -> None:
        super().__init__(shape, None, device)
        self.f = f

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat elements."""
        return self.f(start, stop)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j."""
        n = self.shape[1]
        return self.f(i * n, j * n).view(j - i, n)


@dataclass(frozen=True)
class SMMF(Rule):
    """Adam without bias corrections, both moments factored (see the module's docstring).

    Bytes for N elements of any shape, (a, b) the most square one: ceil(N / 8) + 8 (a + b) + 4, which is
    0.128 N for a large matrix. beta1 is that of the group; beta2 follows from t. With the paper's
    growth_rate the momentum fades: 0.9 is 0.33 after 1000 steps; 1 keeps it.

    Args:
        decay_rate: exponent of t in the average of squares, below 0.
        growth_rate: factor of beta1 for each step, in (0, 1].

    Raises:
        UserError: a number outside its range.

    Example:
        >>> [tuple(v.shape) for v in SMMF().init(torch.zeros(3, 5)).values()]
        [(5,), (3,), (5,), (3,), (2,), ()]
    """

    decay_rate: float = -0.8
    growth_rate: float = 0.999
    reads_later: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bad = {
            f"decay_rate must be below 0, got {self.decay_rate}": not self.decay_rate < 0.0,
            f"growth_rate must be in (0, 1], got {self.growth_rate}": not 0.0 < self.growth_rate <= 1.0,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    def init(self, x: Tensor) -> State:
        """All zero, age 0."""
        a, b = square(x.numel())
        sides = {"row": a, "col": b}
        factors = {
            f"{name}.{key}": torch.zeros(size, device=x.device)
            for name in ("exp_avg", "exp_avg_sq")
            for key, size in sides.items()
        }
        bits = torch.zeros(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
        return {**factors, "signs": bits, "age": torch.zeros((), dtype=torch.int32, device=x.device)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - b1, 1 - b2 and eps."""
        return 1.0 - hp.betas[0] * self.growth_rate ** (t - 1), t**self.decay_rate, max(hp.eps, LEAST_EPS)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the new sums; the step is made from the old ones while it is written."""
        ok = self._sound(g, hp)
        s["age"].add_(ok)
        moments = self._moments(g, s, hp)
        new = self._sums(moments, s, g.device)
        eps = numbers_of(self, s["age"], hp)[2]

        def step(start: int, stop: int) -> Tensor:
            first, second = moments(start, stop)
            return first / (second.sqrt() + eps)

        def commit() -> None:
            for start, stop in walk(list(ranges(s)), g.device):
                held = s["signs"][start // 8 : -(-stop // 8)]
                held.copy_(torch.where(ok, packed(moments(start, stop)[0] > 0.0), held))
            for key, value in new.items():
                s[key].copy_(torch.where(ok, value, s[key]))

        return Direction(Moved(g.shape, step, g.device), ok=ok, commit=commit)

    @staticmethod
    def _sound(g: Blocks, hp: Hyper) -> Tensor:
        """No sum of squares can be infinite."""
        top = torch.stack([g.rows(i, j).abs().amax() for i, j in walk(g.ranges(), g.device)]).amax()
        return hp.total(top, "max") <= math.sqrt(LARGEST_MEAN / (g.shape[0] * g.shape[1]))

    def _moments(self, g: Blocks, s: State, hp: Hyper) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        """Both moments after this gradient, of a flat range."""
        first, second = scoped(s, "exp_avg"), scoped(s, "exp_avg_sq")
        rate1, rate2 = numbers_of(self, s["age"], hp)[:2].unbind()

        def moments(start: int, stop: int) -> tuple[Tensor, Tensor]:
            new = g.chunk(start, stop).float()
            average = outer(first, start, stop).mul_(signs(s["signs"], start, stop))
            squares = outer(second, start, stop)
            return average.lerp_(new, rate1), squares.lerp_(new.square(), rate2)

        return moments

    @staticmethod
    def _sums(moments: Callable[[int, int], tuple[Tensor, Tensor]], s: State, device: torch.device) -> State:
        """Row and column sums of |M| and V, the columns over their total."""
        names = ("exp_avg", "exp_avg_sq")
        new = {key: torch.zeros_like(s[key]) for key in s if key.startswith(names)}
        width = s["exp_avg.col"].numel()
        for start, stop in walk(list(ranges(s)), device):
            for name, value in zip(names, moments(start, stop), strict=True):
                rows = value.abs().view(-1, width)
                new[f"{name}.row"][start // width : stop // width] = rows.sum(1)
                new[f"{name}.col"] += rows.sum(0)
        for name in names:
            new[f"{name}.col"] /= new[f"{name}.col"].sum().clamp(min=TINY)
        return new

    def check_rebase(self, kind: str) -> None:
        """Factors of a moment do not determine those in another basis."""
        if kind in ("permute", "rotate"):
            raise UserError("on_refresh='rotate' is not defined for smmf's factors; take 'reset' or 'keep'")


def ranges(s: State) -> Iterator[tuple[int, int]]:
    """Flat ranges of whole rows of the square, each beginning with a whole byte of signs."""
    height, width = s["exp_avg.row"].numel(), s["exp_avg.col"].numel()
    step = max(8, BLOCK // width // 8 * 8)
    for i in range(0, height, step):
        yield i * width, min(height, i + step) * width
