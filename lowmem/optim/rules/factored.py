"""Rules whose second moment is held by less than one number for each element.

    CAME      row and column means of squares, and of how far steps lie from their average
    SM3       row and column maxima of sums of squares
    AdamMini  one number for each row, or head
    AdamRankOne  4 bits, under scales of rows and columns

What divides a gradient is made of the two vectors row block by row block. A vector is a
matrix of one row: then both hold its second moment exactly, in one number for each element.
A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction, matrix_shape
from lowmem.optim.codecs.blockwise import Codec, Dense, codec
from lowmem.optim.codecs.factored import LARGEST, Factored, RowCol
from lowmem.optim.codecs.rankone import RankOne, least, maxima
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.engine.cutting import walk
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.hyper import Hyper
from lowmem.optim.rules.adafactor import quotient
from lowmem.optim.rules.adam import LEAST_EPS, Adam
from lowmem.optim.rules.normalised import row_squares
from lowmem.optim.state import Constants, State, part, prefixed, scoped


@dataclass(frozen=True)
class CAME(Rule):
    """Adafactor's step, averaged, and shorter where steps disagree with their average (arXiv 2307.02047).

        V <- V + (1 - beta2)(G^2 + eps1 - V),  U = G / sqrt(V), clipped to an rms of clip_threshold
        M <- M + (1 - beta1)(U - M)
        S <- S + (1 - beta3)((U - M)^2 + eps2 - S),  D = M / sqrt(S)

    V and S are held by their row and column means. There is no bias correction: the first step is
    about 10 lr long, so warm up. A vector takes D = M. betas are those of the group.
    Bytes for an (m, n) weight: 8 (m + n), and what the codec takes for M, 4 m n in fp32; for a vector
    of d elements 4 d + 4 and M.

    Args:
        held: codec of M.
        factored: how V and S are held.
        beta3: share of the old S, in [0, 1).
        clip_threshold: largest rms of U, above 0.
        eps1, eps2: added to the squares, at least 0.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> sorted(CAME.of("int8").init(torch.zeros(5)))
        ['exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq.col', 'exp_avg_sq.row']
    """

    held: Codec = field(default_factory=lambda: Dense(stream="exp_avg"))
    factored: Factored = field(default_factory=RowCol)
    beta3: float = 0.9999
    clip_threshold: float = 1.0
    eps1: float = 1e-30
    eps2: float = 1e-16
    reads_later: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bad = {
            f"beta3 must be in [0, 1), got {self.beta3}": not 0.0 <= self.beta3 < 1.0,
            f"clip_threshold must be above 0, got {self.clip_threshold}": not self.clip_threshold > 0.0,
            f"eps1 must be at least 0, got {self.eps1}": not self.eps1 >= 0.0,
            f"eps2 must be at least 0, got {self.eps2}": not self.eps2 >= 0.0,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    @classmethod
    def of(
        cls, states: str, *, beta3: float = 0.9999, clip_threshold: float = 1.0, eps1: float = 1e-30,
        eps2: float = 1e-16, floor: float = 0.0,
    ) -> CAME:  # fmt: skip
        """CAME with its average held as `states` says; `floor` is that of `RowCol`, for a subspace."""
        held = codec(states, signed=True, stream="exp_avg")
        return cls(held, RowCol(floor), beta3, clip_threshold, eps1, eps2)

    @property
    def uses(self) -> frozenset[str]:
        """beta1 and beta2; what is added to squares is decided where buffers are."""
        return frozenset({"betas"})

    def init(self, x: Tensor) -> State:
        """All moments zero."""
        moments = prefixed("exp_avg", self.held.init(x)) | prefixed("exp_avg_sq", self.factored.init(x))
        return moments | (prefixed("exp_avg_res", self.factored.init(x)) if x.dim() > 1 else {})

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Two factored averages, each in a pass; what both divide is left to the write."""
        beta1, beta2 = hp.betas
        moment = HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp)
        squares = self.factored.reduce(g, self.eps1, hp)
        ok = self.factored.sound(squares, hp)
        u = quotient(g, *self._after(s, "exp_avg_sq", squares, beta2, ok, hp), self.clip_threshold, hp)
        d = moment.towards(u, 1.0 - beta1)
        commit = moment.following(u, 1.0 - beta1, ok)
        if "exp_avg_res.row" not in s:
            return Direction(d, ok=ok, commit=commit)
        apart = self.factored.reduce(_difference(u, d), self.eps2, hp)
        p, q = self._after(s, "exp_avg_res", apart, self.beta3, ok, hp)
        steady = Blocks(g.shape, lambda i, j: (d.rows(i, j) * q).mul_(p[i:j, None]), g.device)
        return Direction(steady, ok=ok, commit=commit)

    def _after(
        self, s: State, name: str, new: State, beta: float, ok: Tensor, hp: Hyper
    ) -> tuple[Tensor, Tensor]:
        """Move a factored average; the roots of what it is then."""
        held = scoped(s, name)
        self.factored.average_(held, new, hp.vector(1.0 - beta, dtype=torch.float32)[0], ok)
        return self.factored.roots(held, hp)

    def check_rebase(self, kind: str) -> None:
        """Means over rows and columns do not determine those in another basis."""
        if kind in ("permute", "rotate"):
            raise UserError(
                "on_refresh='rotate' is not defined for row and column means; take 'reset' or 'keep'"
            )


def _difference(a: Blocks, b: Blocks) -> Blocks:
    return Blocks(a.shape, lambda i, j: a.rows(i, j) - b.rows(i, j), a.device)


@dataclass(frozen=True)
class SM3(Rule):
    """Adagrad with sums of squares bounded by a number for each row and column (SM3-II, arXiv 1901.11150).

        N = min(R, C) + G^2,  R <- row maxima of N,  C <- column maxima of N
        U = G / sqrt(N),  D = U, or M <- M + (1 - momentum)(U - M) and D = M

    No element of N is smaller than the sum of all its squares so far. N never shrinks: steps become
    shorter as in Adagrad, so lr may stay as it is. Bytes for an (m, n) weight: 4 (m + n), and with a momentum
    what the codec takes, 4 m n in fp32; for a vector of d elements 4 d + 4.

    Args:
        held: codec of the momentum, None for no momentum.
        momentum: share of the old momentum, in [0, 1); 0 for none.
        floor: share of the largest element of N that is added to each, at least 0: in a subspace, a
            direction that the gradient does not have holds rounding noise.

    Example:
        >>> {key: tuple(value.shape) for key, value in SM3().init(torch.zeros(3, 5)).items()}
        {'accumulator.row': (3,), 'accumulator.col': (5,)}
    """

    held: Codec | None = None
    momentum: float = 0.0
    floor: float = 0.0
    small: ClassVar[float] = 1e-30

    @classmethod
    def of(cls, states: str, *, momentum: float = 0.0, floor: float = 0.0) -> SM3:
        """The rule with its momentum, if there is one, held as `states` says.

        Raises:
            UserError: a momentum outside [0, 1).
        """
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"momentum must be in [0, 1), got {momentum}")
        return cls(codec(states, signed=True, stream="momentum") if momentum else None, momentum, floor)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    @property
    def reads_later(self) -> bool:
        """Where a momentum is moved."""
        return self.held is not None

    def init(self, x: Tensor) -> State:
        """Sums of zero, and a momentum of zero, if there is one."""
        sums = prefixed("accumulator", RowCol().init(x))
        return sums | (prefixed("momentum", self.held.init(x)) if self.held else {})

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held) if self.held else {}

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the new maxima; the step is made from the old ones while it is written."""
        sums = scoped(s, "accumulator")
        n = Blocks(g.shape, lambda i, j: least(sums, i, j).addcmul_(g.rows(i, j), g.rows(i, j)), g.device)
        new = maxima(n, hp)
        top = hp.total(new["row"].amax(), "max")
        ok, small = top <= LARGEST, self.floor * top + self.small
        u = Blocks(g.shape, lambda i, j: g.rows(i, j) * n.rows(i, j).add_(small).rsqrt_(), g.device)

        def grow() -> None:
            for key, value in new.items():
                sums[key].copy_(torch.where(ok, value, sums[key]))

        if self.held is None:
            return Direction(u, ok=ok, commit=grow)
        moment = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp)
        follow = moment.following(u, 1.0 - self.momentum, ok)

        def commit() -> None:
            follow()
            grow()

        return Direction(moment.towards(u, 1.0 - self.momentum), ok=ok, commit=commit)


@dataclass(frozen=True)
class AdamMini(Rule):
    """Adam with one second moment for each block of a weight whose curvature is alike (arXiv 2406.16793).

        v_b <- v_b + (1 - beta2)(mean of G^2 over the block - v_b),  M <- M + (1 - beta1)(G - M)
        D = M / (1 - beta1^t) / (sqrt(v_b / (1 - beta2^t)) + eps)

    A block is a row: an output neuron, a token. Of query and key weights it is a head, whose v is the mean
    of its rows'; a vector is one block. Published code takes blocks by parts of names, and one for a whole
    weight that it does not know. Bytes for an (m, n) weight: 4 m + 4, and what the codec takes for M,
    4 m n in fp32; for a vector 8 and M.

    Args:
        held: codec of M.

    Example:
        >>> {key: tuple(value.shape) for key, value in AdamMini().init(torch.zeros(3, 5)).items()}
        {'exp_avg': (3, 5), 'exp_avg_sq': (3,), 'age': ()}
    """

    held: Codec = field(default_factory=lambda: Dense(stream="exp_avg"))
    reads_later: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str) -> AdamMini:
        """Adam-mini with its average held as `states` says."""
        return cls(codec(states, signed=True, stream="exp_avg"))

    def init(self, x: Tensor) -> State:
        """Both moments zero, age 0."""
        return prefixed("exp_avg", self.held.init(x)) | {
            "exp_avg_sq": torch.zeros(matrix_shape(x.shape)[0], device=x.device),
            "age": torch.zeros((), dtype=torch.int32, device=x.device),
        }

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta2, eps, and what the bias corrections multiply by."""
        beta1, beta2 = hp.betas
        return 1.0 - beta2, max(hp.eps, LEAST_EPS), 1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move the second moments; the first moves after the write."""
        squares, v = torch.empty(g.shape[0], device=g.device), s["exp_avg_sq"]
        for i, j in walk(g.ranges(), g.device):
            squares[i:j] = row_squares(g.rows(i, j)) / g.shape[1]
        ok = hp.total(squares.amax(), "max") <= LARGEST
        s["age"].add_(ok)
        rate2, eps, correction1, correction2 = numbers_of(self, s["age"], hp).unbind()
        v.lerp_(torch.where(ok, squares, v), rate2)
        share = correction1 / (self._of_blocks(v, g, hp).sqrt() * correction2 + eps)
        moment = HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp)
        rate1 = 1.0 - hp.betas[0]
        m = moment.towards(g, rate1)
        d = Blocks(g.shape, lambda i, j: m.rows(i, j).mul_(share[i:j, None]), g.device)
        return Direction(d, ok=ok, commit=moment.following(g, rate1, ok))

    @staticmethod
    def _of_blocks(v: Tensor, g: Blocks, hp: Hyper) -> Tensor:
        """Second moments of rows, the mean of its head for each row of a query or key weight."""
        if hp.heads < 2 or g.shape != hp.weight.shape:  # in a subspace, rows are directions
            return v
        return v.view(hp.heads, -1).mean(1).repeat_interleave(v.numel() // hp.heads)


@dataclass(frozen=True)
class AdamRankOne(Rule):
    """Adam with its second moment in 4 bits under scales of rows and columns (arXiv 2309.01507).

    The arithmetic is Adam's, in fp32; V is decoded before it, row block by row block, and encoded after the
    write (`RankOne`). Bytes for an (m, n) weight: ceil(m n / 2) + 4 (m + n) + 4, and what the codec takes for
    the first moment, ceil(m n / 2) + 4 ceil(m n / 128) in 4 bits.

    Args:
        held: codec of the first moment; second: how the second is held.

    Example:
        >>> sorted(AdamRankOne.of("bf16").init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq.codes', 'exp_avg_sq.col', 'exp_avg_sq.row']
    """

    held: Codec = field(default_factory=lambda: Dense(stream="exp_avg"))
    second: RankOne = field(default_factory=RankOne)
    adam: ClassVar[Adam] = Adam()
    reads_later: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str) -> AdamRankOne:
        """The rule with its first moment held as `states` says."""
        return cls(codec(states, signed=True, stream="exp_avg"))

    def init(self, x: Tensor) -> State:
        """Both moments zero, age 0."""
        moments = prefixed("exp_avg", self.held.init(x)) | prefixed("exp_avg_sq", self.second.init(x))
        return {**moments, "age": torch.zeros((), dtype=torch.int32, device=x.device)}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """The new scales take a pass; both moments move after the write."""
        beta1, beta2 = hp.betas
        square, moment = scoped(s, "exp_avg_sq"), HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp)

        def squares(i: int, j: int) -> Tensor:
            return self.second.rows(square, i, j).lerp_(g.rows(i, j).square(), 1.0 - beta2)

        v = Blocks(g.shape, squares, g.device)
        new = maxima(v, hp)
        ok = hp.total(new["row"].amax(), "max") <= LARGEST
        s["age"].add_(ok)
        _, _, eps, correction1, correction2 = numbers_of(self.adam, s["age"], hp).unbind()
        m = moment.towards(g, 1.0 - beta1)
        follow = moment.following(g, 1.0 - beta1, ok)

        def step(i: int, j: int) -> Tensor:
            return m.rows(i, j).mul_(correction1).div_(v.rows(i, j).sqrt_().mul_(correction2).add_(eps))

        def commit() -> None:
            follow()
            self.second.store_(square, v, new, ok)

        return Direction(Blocks(g.shape, step, g.device), ok=ok, commit=commit)
