"""Rules that make a step of a gradient by dividing it by its own size, and hold nothing or a momentum.

    SinkGD    rows and columns in turn, until all have size one
    Scaled    rows, or columns, once; SCALE takes a momentum for the head alone
    AuON      a momentum, as a whole, to norm one

What is divided is seen over its largest element, so that no square overflows or
vanishes: the size of a gradient does not matter, however small. A row or column of
zeros stays zero. A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.codecs.blockwise import Codec, codec
from lowmem.optim.contract import Rule
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.shards import Shape, whole
from lowmem.optim.terms.fp32 import LARGEST, TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


def unit(g: Blocks, hp: Hyper) -> tuple[Blocks, Tensor]:
    """The matrix over its largest element, and a 0-D bool: all of it is finite."""
    top = hp.peak(g)
    ok = top <= LARGEST
    return Formula(torch.div, (g,), across=(torch.where(ok & (top > TINY), top, 1.0),)), ok


def inverse(squares: Tensor, size: float) -> Tensor:
    """What makes a row with this sum of squares `size` long; of zeros, 0."""
    return torch.where(squares > 0.0, math.sqrt(size) * squares.clamp(min=TINY).rsqrt(), 0.0)


def row_squares(rows: Tensor) -> Tensor:
    """Sums of squares of rows; contiguous, so that any layout gives the same bits."""
    return rows.contiguous().square().sum(1)


@dataclass(frozen=True)
class SinkGD(Rule):
    """The gradient with rows and columns of one size, by Sinkhorn's iteration (arXiv 2502.06742).

        iterations times:  rows of X <- sqrt(n) row / |row|,  columns of X <- sqrt(m) column / |column|
        D = alpha X,  X = G at first

    X = diag(a) G diag(b): only the two vectors are iterated, in iterations + 2 passes over G.
    Afterwards columns have rms 1 exactly, rows nearly. Holds 0 bytes for an (m, n) weight;
    the workspace is that of every step and 4 (m + 2 n) bytes. Without a momentum, a large batch matters.

    Args:
        iterations: at least 1.
        alpha: rms of D, above 0.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> SinkGD().init(torch.zeros(3, 5))
        {}
    """

    iterations: int = 5
    alpha: float = 0.05

    def __post_init__(self) -> None:
        bad = {
            f"iterations must be at least 1, got {self.iterations}": self.iterations < 1,
            f"alpha must be above 0, got {self.alpha}": not self.alpha > 0.0,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def shards(self, shape: Shape) -> bool:
        """Always: sizes of columns are summed."""
        return True

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find both vectors; the product with G is left to the write."""
        x, ok = unit(g, hp)
        m, n = g.shape
        a, b = torch.zeros(m, device=g.device), torch.ones(n, device=g.device)
        for _ in range(self.iterations):
            columns = torch.zeros_like(b)
            hp.sweep(_scale_rows_, x, (a,), (b, columns), (n,))
            hp.reckon(_scale_columns_, (b, hp.total(columns)), (whole(g.shape)[0],))
        return Direction(Formula(_between, (x,), (a,), (b,)), scale=self.alpha, ok=ok)


def _scale_rows_(rows: Tensor, a: Tensor, b: Tensor, columns: Tensor, n: int) -> None:
    """Find what makes rows equally long, and add up the squares of columns once they are."""
    rows = rows * b
    a.copy_(inverse(row_squares(rows), n))
    columns.add_(rows.mul_(a[:, None]).square_().sum(0))


def _scale_columns_(b: Tensor, columns: Tensor, m: int) -> None:
    b.mul_(inverse(columns, m))


def _between(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (rows * b).mul_(a)


@dataclass(frozen=True)
class Scaled(Rule):
    """The gradient, or a momentum, with rows or columns of rms 1 (SCALE, arXiv 2506.16659).

        M <- M + (1 - momentum)(G - M)  (or M = G where momentum is 0)
        D = each row of M (or column) over its rms

    The paper divides by norms: its learning rates are sqrt(n) times larger. Bytes for an (m, n)
    weight: none without a momentum, else what the codec takes, 4 m n in fp32.

    Args:
        held: codec of the momentum, None for no momentum.
        momentum: share of the old momentum, in [0, 1); 0 for none.
        columns: whether columns are scaled, as for embeddings, instead of rows.

    Example:
        >>> sorted(Scaled.of("int8", momentum=0.9).init(torch.zeros(3, 5)))
        ['momentum.codes', 'momentum.scale']
    """

    held: Codec | None = None
    momentum: float = 0.0
    columns: bool = False
    reads_later: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, momentum: float = 0.0, columns: bool = False) -> Scaled:
        """The rule with its momentum, if there is one, held as `states` says.

        Raises:
            UserError: a momentum outside [0, 1).
        """
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"momentum must be in [0, 1), got {momentum}")
        held = codec(states, signed=True, stream="momentum") if momentum else None
        return cls(held, momentum, columns)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def init(self, x: Tensor) -> State:
        """A momentum of zero, or nothing."""
        return prefixed("momentum", self.held.init(x)) if self.held else {}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held) if self.held else {}

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the momentum."""
        return self.held is None or shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the sizes; the division is left to the write."""
        if self.held is None:
            x, ok = unit(g, hp)
            return Direction(self._divided(x, hp), ok=ok)
        moment = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp)
        x, ok = unit(moment.towards(g, 1.0 - self.momentum), hp)
        commit = moment.following(g, 1.0 - self.momentum, ok)
        return Direction(self._divided(x, hp), ok=ok, commit=commit)

    def _divided(self, x: Blocks, hp: Hyper) -> Blocks:
        """Rows, or columns, over their rms."""
        m, n = whole(x.shape)
        if not self.columns:
            sizes = torch.zeros(x.shape[0], device=x.device)
            hp.sweep(_note_inverse, x, (sizes,), (), (n,))
            return Formula(torch.mul, (x,), (sizes,))
        squares = torch.zeros(n, device=x.device)
        hp.sweep(_add_squares_, x, (), (squares,))
        return Formula(torch.mul, (x,), across=(inverse(hp.total(squares), m),))


def _note_inverse(rows: Tensor, sizes: Tensor, n: int) -> None:
    sizes.copy_(inverse(row_squares(rows), n))


def _add_squares_(rows: Tensor, squares: Tensor) -> None:
    squares.add_(rows.square().sum(0))


@dataclass(frozen=True)
class AuON(Rule):
    """The momentum over its norm, shorter where a few elements are all of it (arXiv 2509.24320).

        M <- M + (1 - momentum)(G - M),  U = (1 - momentum) G + momentum M,  X = U / |U|
        D = s X / rms(cosh(gamma X)),  s = sqrt(max(1, m / n)), or 0.2 sqrt(m n)

    Of a large matrix, the elements of X are so small that their cosh is 1: the rule is a normalised
    momentum. Published code steps by U, neither normalised nor scaled ("released"). Bytes for an (m, n)
    weight: what the codec takes, 4 m n in fp32.

    Args:
        held: codec of the momentum.
        momentum: share of the old momentum, in [0, 1).
        gamma: how much large elements count, above 0.
        scaling: aspect (the paper's), rms (steps as long as AdamW's) or released.

    Raises:
        UserError: a number or word outside its range.

    Example:
        >>> sorted(AuON.of("int8").init(torch.zeros(3, 5)))
        ['momentum.codes', 'momentum.scale']
    """

    held: Codec
    momentum: float = 0.95
    gamma: float = 1.5
    scaling: str = "aspect"
    scalings: ClassVar[tuple[str, ...]] = ("aspect", "rms", "released")
    reads_later: ClassVar[bool] = True

    def __post_init__(self) -> None:
        word = self.scaling
        bad = {
            f"momentum must be in [0, 1), got {self.momentum}": not 0.0 <= self.momentum < 1.0,
            f"gamma must be above 0, got {self.gamma}": not self.gamma > 0.0,
            f"unknown scaling {word!r}; {nearest(word, self.scalings)}": word not in self.scalings,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    @classmethod
    def of(cls, states: str, *, momentum: float = 0.95, gamma: float = 1.5, scaling: str = "aspect") -> AuON:
        """The rule with its momentum held as `states` says."""
        return cls(codec(states, signed=True, stream="momentum"), momentum, gamma, scaling)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def init(self, x: Tensor) -> State:
        """A momentum of zero."""
        return prefixed("momentum", self.held.init(x))

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the momentum."""
        return shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Two sums over the matrix; what is divided is left to the write."""
        share = 1.0 - self.momentum
        moment = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp)
        average = moment.towards(g, share)
        u = Formula(_Ahead(self.momentum), (g, average))
        x, ok = unit(u, hp)
        over = inverse(_sum(_squared, x, hp), 1.0)
        m, n = whole(g.shape)
        spread = (_sum(_wide, x, hp, self.gamma * over) / (m * n)).rsqrt()
        if self.scaling == "released":
            step = Formula(torch.mul, (u,), across=(spread,))
            return Direction(step, ok=ok, commit=moment.following(g, share, ok))
        scale = math.sqrt(max(1.0, m / n)) if self.scaling == "aspect" else 0.2 * math.sqrt(m * n)
        step = Formula(torch.mul, (x,), across=(over * spread,))
        return Direction(step, scale=scale, ok=ok, commit=moment.following(g, share, ok))


@dataclass(frozen=True)
class _Ahead:
    """What the momentum will be after this gradient, looked ahead of by it."""

    momentum: float

    def __call__(self, new: Tensor, average: Tensor) -> Tensor:
        return new.lerp(average, self.momentum)


def _squared(rows: Tensor) -> Tensor:
    return rows.square().sum(1).sum()


def _wide(rows: Tensor, factor: Tensor) -> Tensor:
    return (rows * factor).cosh_().square_().sum(1).sum()


def _sum(f: Callable[..., Tensor], x: Blocks, hp: Hyper, *across: Tensor) -> Tensor:
    """The sum of what f gives of rows, 0-D."""
    return hp.total(hp.parts(f, x, across, dtype=torch.float32).sum())
