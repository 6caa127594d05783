"""Rules that make a step of a gradient by dividing it by its own size, and hold nothing or a momentum.

    SinkGD    rows and columns in turn, until all have size one
    Scaled    rows, or columns, once; SCALE takes a momentum for the head alone
    AuON      a momentum, as a whole, to norm one
    SWAN      rows around their mean, then all singular values

What is divided is seen over its largest element, so that no square overflows or
vanishes: the size of a gradient does not matter, however small. A row or column of
zeros stays zero. A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.codecs.blockwise import Codec, codec
from lowmem.optim.contract import SCRATCH, Rule
from lowmem.optim.engine.cutting import walk
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.measured.layerwise import LEAST_SPREAD
from lowmem.optim.rules.normalised.muon import Product, gram, left_, newton_schulz
from lowmem.optim.shards import Shape, whole
from lowmem.optim.terms.fp32 import LARGEST, TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


def unit(g: Blocks, hp: Hyper) -> tuple[Blocks, Tensor]:
    """The matrix over its largest element, and a 0-D bool: all of it is finite."""
    top = hp.total(g.peak(), "max")
    ok = top <= LARGEST
    return g.map(lambda rows: rows / torch.where(ok & (top > TINY), top, 1.0)), ok


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
            for i, j in walk(g.ranges(), g.device):
                rows = x.rows(i, j) * b
                a[i:j] = inverse(row_squares(rows), n)
                columns += rows.mul_(a[i:j, None]).square_().sum(0)
            b = b * inverse(hp.total(columns), whole(g.shape)[0])
        blocks = Blocks(g.shape, lambda i, j: (x.rows(i, j) * b).mul_(a[i:j, None]), g.device)
        return Direction(blocks, scale=self.alpha, ok=ok)


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
            return x.map(lambda rows: rows * inverse(row_squares(rows), n)[:, None])
        squares = torch.zeros(n, device=x.device)
        for i, j in walk(x.ranges(), x.device):
            squares += x.rows(i, j).square().sum(0)
        q = inverse(hp.total(squares), m)
        return x.map(lambda rows: rows * q)


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
        u = Blocks(g.shape, lambda i, j: g.rows(i, j).lerp(average.rows(i, j), self.momentum), g.device)
        x, ok = unit(u, hp)
        over = inverse(_sum(x.map(torch.square), hp), 1.0)
        wide = x.map(lambda rows: (rows * (self.gamma * over)).cosh_().square_())
        m, n = whole(g.shape)
        spread = (_sum(wide, hp) / (m * n)).rsqrt()
        if self.scaling == "released":
            return Direction(u.map(lambda rows: rows * spread), ok=ok, commit=moment.following(g, share, ok))
        scale = math.sqrt(max(1.0, m / n)) if self.scaling == "aspect" else 0.2 * math.sqrt(m * n)
        step = x.map(lambda rows: rows * (over * spread))
        return Direction(step, scale=scale, ok=ok, commit=moment.following(g, share, ok))


def _sum(x: Blocks, hp: Hyper) -> Tensor:
    """The sum of all elements, 0-D."""
    return hp.total(torch.stack([x.rows(i, j).sum(1).sum() for i, j in walk(x.ranges(), x.device)]).sum())


@dataclass(frozen=True)
class SWAN(Rule):
    """The gradient with rows of mean 0 and rms 1, then with equal singular values (arXiv 2412.13148).

        X = (G - row means) / row deviations
        D = (X X')^(-1/2) X |X| / |(X X')^(-1/2) X|,  by Newton and Schulz

    D has rms 1. A tall X has rank n - 1, for its rows have mean 0: what is made equal are the singular
    values that are not 0. Those below 1 / 1.5^iterations of the norm of X X' (its root) stay smaller. Rows
    of equal elements stand still. Holds 0 bytes for an (m, n) weight; the workspace is 12 s^2 bytes beside
    that of every step, s the short side.

    Args:
        iterations: of Newton and Schulz, at least 1.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> SWAN().init(torch.zeros(3, 5))
        {}
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"iterations must be at least 1, got {self.iterations}")

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def scratch(self, shape: tuple[int, int]) -> int:
        """Three matrices of the short side."""
        return SCRATCH + 12 * min(shape) ** 2

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find what X is multiplied by; the product is left to the write."""
        x, ok = unit(g, hp)
        x = x.map(_standardised)
        a = gram(x)
        squares, norm = a.diagonal().sum(), torch.linalg.matrix_norm(a).sqrt().clamp(min=TINY**0.5)
        t, p, last = newton_schulz(a, norm, [(1.5, -0.5, 0.0)] * self.iterations)
        left_(p, last)
        equal = torch.dot(last.view(-1), p.view(-1))  # the trace of P A P, the squared norm of T X
        t.mul_(torch.where(equal > 0.0, (squares / equal).sqrt(), 0.0))
        return Direction(Product(t, x), ok=ok)


def _standardised(rows: Tensor) -> Tensor:
    """Rows less their mean over their deviation; of equal elements, 0."""
    centred = rows - rows.mean(1, keepdim=True)
    squares = row_squares(centred)
    spread = squares > LEAST_SPREAD * row_squares(rows)
    return centred * torch.where(spread, inverse(squares, rows.shape[1]), 0.0)[:, None]
