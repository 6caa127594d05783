"""Rules around a momentum with equal singular values that are not Muon itself.

    AdaMuon   Muon's step over the root of the average of its squares
    Dion      the orthogonal factor of a low-rank part of the momentum, and the rest kept in it

A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction, matrix_shape
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.contract import SCRATCH, Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula, Product
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.normalised.muon import Muon
from lowmem.optim.rules.normalised.rows import inverse, row_squares
from lowmem.optim.shards import Shape, shard_in, whole
from lowmem.optim.terms.fp32 import LARGEST, LEAST_EPS, TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


@dataclass(frozen=True)
class AdaMuon(Rule):
    """Muon's step, element by element over its own size (arXiv 2507.11005).

        O = orthogonal factor of sign(momentum),  V <- V + (1 - beta2)(O^2 - V)
        N = O / (sqrt(V / (1 - beta2^t)) + eps),  D = N with an rms of 0.2

    Published code takes the momentum in the place of its sign. beta2 and eps are those of the group.
    Bytes for an (m, n) weight: what the codecs take for both moments, 8 m n in fp32, and 4.
    Workspace: Muon's.

    Args:
        muon: the momentum, and how it is made orthogonal.
        held: codec of V.

    Example:
        >>> sorted(AdaMuon.of("int8").init(torch.zeros(3, 5)))
        ['age', 'exp_avg_sq.codes', 'exp_avg_sq.scale', 'momentum.codes', 'momentum.scale']
    """

    muon: Muon = field(default_factory=lambda: Muon(sign=True))
    held: Codec = field(default_factory=lambda: Floats(stream="exp_avg_sq", signed=False))
    rms: ClassVar[float] = 0.2
    reads_later: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        states: str,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        sign: bool = True,
        products: str = "fp32",
    ) -> AdaMuon:
        """AdaMuon with both moments held as `states` says; the rest is Muon's."""
        muon = Muon.of(
            states, momentum=momentum, nesterov=nesterov, iterations=iterations, sign=sign, products=products
        )
        return cls(muon, codec(states, signed=False, stream="exp_avg_sq"))

    def scratch(self, shape: tuple[int, int]) -> int:
        """Muon's."""
        return self.muon.scratch(shape)

    def init(self, x: Tensor) -> State:
        """Both moments zero, age 0."""
        moments = self.muon.init(x) | prefixed("exp_avg_sq", self.held.init(x))
        return {**moments, "age": torch.zeros((), dtype=torch.int32, device=x.device)}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return {**self.muon.constants(shape), **tables(self.held)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """What the bias correction multiplies the root by, and eps."""
        return (1.0 - hp.betas[1] ** t) ** -0.5, max(hp.eps, LEAST_EPS)

    def shards(self, shape: Shape) -> bool:
        """Where Muon does, and shards start on a block of V."""
        return self.muon.shards(shape) and shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Muon's step is made twice: for the length of N, and while it is written."""
        made, rate = self.muon.update(g, s, hp), 1.0 - hp.betas[1]
        o, ok = made.blocks, made.ok
        assert ok is not None
        s["age"].add_(ok)
        correction, eps = numbers_of(self, s["age"], hp).unbind()
        second = HeldMoment(self.held, part(s, "exp_avg_sq"), s, g.shape, hp)
        n = Formula(_Adapted(rate), (o, second), across=(correction, eps))
        squares = hp.parts(_squares, n, dtype=torch.float32).sum()
        length = self.rms * inverse(hp.total(squares), math.prod(whole(g.shape)))
        follow = second.following(Formula(torch.square, (o,)), rate, ok)

        def commit() -> None:
            follow()  # reads the momentum before this gradient
            if made.commit:
                made.commit()

        return Direction(Formula(torch.mul, (n,), across=(length,)), ok=ok, commit=commit)


@dataclass(frozen=True)
class _Adapted:
    """O over the root of the average of its squares."""

    rate: float

    def __call__(self, step: Tensor, v: Tensor, correction: Tensor, eps: Tensor) -> Tensor:
        v = v + self.rate * (step.square() - v)
        return step / (v.sqrt_().mul_(correction).add_(eps))


def _squares(rows: Tensor) -> Tensor:
    return row_squares(rows).sum()


def _divided(rows: Tensor, top: Tensor, ok: Tensor) -> Tensor:
    return torch.where(ok, rows / top, 0.0)


@dataclass(frozen=True)
class _Left:
    """The momentum without what was seen of it."""

    share: float

    def __call__(self, old: Tensor, new: Tensor, seen: Tensor, top: Tensor) -> Tensor:
        return old + new - self.share * top * seen


@dataclass(frozen=True)
class Dion(Rule):
    """The orthogonal factor of a low-rank part of the momentum (arXiv 2504.05295).

        B = M + G,  P = orth(B Q),  R = B' P
        M <- B - (1 - momentum) P R',  Q <- R with columns of norm 1,  D = sqrt(m / n) P Q'

    One power iteration for each step, warm from the last. What is not seen stays in M, and is seen later.
    Columns of R below 1e-5 of the longest are rounding noise: they are no step, and Q keeps its own. M is
    as large as the weight: Dion saves arithmetic and, over ranks, communication.
    Bytes for an (m, n) weight: 4 n r, and what the codec takes for M, 4 m n in fp32. Workspace: 8 r (m + n)
    bytes beside that of every step.

    Args:
        rank: columns of P, from 1 on, or their share of the short side, below 1; clipped to that side.
        held: codec of M.
        momentum: share of what was seen that stays in M, in [0, 1).

    Raises:
        UserError: a number outside its range.

    Example:
        >>> {key: tuple(x.shape) for key, x in Dion.of("fp32", rank=2).init(torch.zeros(3, 5)).items()}
        {'momentum': (3, 5), 'basis': (2, 5)}
    """

    rank: float = 128
    held: Codec = field(default_factory=lambda: Floats(stream="momentum"))
    momentum: float = 0.95
    noise: ClassVar[float] = 1e-5
    reads_later: ClassVar[bool] = True

    def __post_init__(self) -> None:
        counts = self.rank >= 1.0 and self.rank % 1.0 == 0.0
        bad = {
            f"rank is a whole number from 1 on, or a share between 0 and 1, got {self.rank}": not (
                counts or 0.0 < self.rank < 1.0
            ),
            f"momentum must be in [0, 1), got {self.momentum}": not 0.0 <= self.momentum < 1.0,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    @classmethod
    def of(cls, states: str, *, rank: float = 128, momentum: float = 0.95) -> Dion:
        """Dion with its momentum held as `states` says."""
        return cls(rank, codec(states, signed=True, stream="momentum"), momentum)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Both factors beside one another."""
        short, both = min(whole(shape)), sum(whole(shape))
        return min(short, int(self.rank) if self.rank >= 1 else max(1, round(short * self.rank))), both

    def scratch(self, shape: tuple[int, int]) -> int:
        """Each factor twice."""
        return SCRATCH + 8 * math.prod(self.low_shape(shape))

    def init(self, x: Tensor) -> State:
        """A momentum of zero, and the first r coordinate axes."""
        shape = matrix_shape(x.shape)
        basis = torch.eye(self.low_shape(shape)[0], shape[1], device=x.device)
        return prefixed("momentum", self.held.init(x)) | {"basis": basis}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the momentum: r columns are gathered, r rows summed."""
        return shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Both factors; their product is left to the write."""
        moment, basis = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp), s["basis"]
        b = Formula(torch.add, (moment, g))
        top = hp.peak(b)
        ok = top <= LARGEST
        top = torch.where(ok & (top > TINY), top, 1.0)
        x = hp.seen(Formula(_divided, (b,), across=(top, ok)))
        start = (
            hp.gaussian((basis.shape[1], basis.shape[0]), "basis").t() if hp.first or hp.step == 0 else basis
        )
        p = self._left(x, start)
        low = hp.total(x.left(p))
        norms = row_squares(low).sqrt()
        strong = norms > self.noise * norms.amax()
        share = torch.where(strong, 1.0 / norms, 0.0)

        seen = Product((p, low), torch.float32)

        def commit() -> None:
            moment.moving(_Left(1.0 - self.momentum), (g, seen), ok, (top,))
            new = torch.where(strong[:, None], low * share[:, None], start)
            basis.copy_(torch.where(ok, new, basis))

        d = Product((p * share, low), torch.float32)
        m, n = whole(g.shape)
        return Direction(d, scale=math.sqrt(m / n), ok=ok, commit=commit)

    @staticmethod
    def _left(x: Blocks, start: Tensor) -> Tensor:
        """P of the rows held here; each rank finds all of it."""
        own, shard = x.right(start.t()), shard_in(x.shape)
        p: Tensor = torch.linalg.qr(own if shard is None else shard.gathered(own)).Q
        return p if shard is None else shard.own(p)
