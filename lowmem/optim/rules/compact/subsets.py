"""Second moments that a subset of elements shares: its norm (AdamSN, arXiv 2411.07120).

    v_i <- beta2 v_i + (1 - beta2) sum of g^2 over subset i
    D = M / (1 - beta1^t) / (sqrt(v_i / (1 - beta2^t)) + eps)

A subset is a row of a tall matrix or a column of a wide one, so that there are as many as the
long side has indices, or `size` elements in a row. The sum is one, not a mean: a step is
sqrt(elements of a subset) times shorter than Adam's, and the paper's learning rates are ten times
larger. What is divided may be anything of the weight's shape: a momentum here, a lifted
momentum with the rest of the gradient in `residuals.SubsetNormed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import BLOCK, Blocks, Direction, matrix_shape
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.engine.cutting import walk
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.shards import Shape, whole
from lowmem.optim.terms.fp32 import LARGEST_MEAN, LEAST_EPS
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


def wide(shape: tuple[int, int]) -> bool:
    """Whether all of a matrix is wide, be it only some of its rows that are here."""
    m, n = whole(shape)
    return m < n


@dataclass(frozen=True)
class Subsets:
    """How a weight is parted, and what is done with one number for each part.

    Args:
        size: elements of a subset, in the order of the rows (the last may have fewer); 0 for rows or columns.
        by_column: columns or rows; if None, columns of a wide matrix, rows of any other.

    Raises:
        UserError: a negative size.
    """

    size: int = 0
    by_column: bool | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"subset_size is a number of elements, or 0 for rows or columns, got {self.size}")

    def init(self, x: Tensor) -> Tensor:
        """A second moment of zero."""
        m, n = shape = matrix_shape(x.shape)
        rows = n if self._columns(shape) else m
        return torch.zeros(-(-m * n // self.size) if self.size else rows, device=x.device)

    def _columns(self, shape: tuple[int, int]) -> bool:
        return wide(shape) if self.by_column is None else self.by_column

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta2, eps, and what the bias corrections multiply by."""
        beta1, beta2 = hp.betas
        return 1.0 - beta2, max(hp.eps, LEAST_EPS), 1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5

    def sums(self, g: Blocks, hp: Hyper) -> Tensor:
        """The sum of squares of each subset; one with an element that is not finite is not finite."""
        if self.size:
            return self._pieces(g)
        m, n = g.shape
        by_column = self._columns(g.shape)
        out = torch.zeros(n if by_column else m, device=g.device)
        hp.sweep(
            _add_squares_ if by_column else _note_squares, g, *(((), (out,)) if by_column else ((out,),))
        )
        return hp.total(out) if by_column else out

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a subset."""
        return shape.shard.starts_on(self.size or 1)

    def sound(self, sums: Tensor, hp: Hyper) -> Tensor:
        """0-D bool, the same on all ranks: no subset's sum is too large."""
        top = sums.amax() if sums.numel() else sums.new_zeros(())
        return hp.total(top, "max") <= LARGEST_MEAN

    def _pieces(self, g: Blocks) -> Tensor:
        total = g.shape[0] * g.shape[1]
        if not total:
            return torch.zeros(0, device=g.device)
        step = max(1, BLOCK // self.size) * self.size
        parts = []
        for start in walk(range(0, total, step), g.device):
            flat = g.chunk(start, min(total, start + step)).float()
            short = -flat.numel() % self.size
            parts.append(torch.nn.functional.pad(flat, (0, short)).view(-1, self.size).square().sum(1))
        return torch.cat(parts)

    def divided(self, x: Blocks, v: Tensor, numbers: Tensor) -> Blocks:
        """x over the root of its subset's moment, without bias; numbers as `numbers` gives them."""
        _, eps, first, root = numbers.unbind()
        factors = first / (v.sqrt() * root + eps)
        n = x.shape[1]
        if not self.size:
            down, across = ((), (factors,)) if self._columns(x.shape) else ((factors,), ())
            return Formula(torch.mul, (x,), down, across)

        def rows(i: int, j: int) -> Tensor:
            own = factors[torch.arange(i * n, j * n, device=x.device) // self.size].view(j - i, n)
            return x.rows(i, j) * own

        return Blocks(x.shape, rows, x.device)


def _add_squares_(rows: Tensor, out: Tensor) -> None:
    out.add_(rows.contiguous().square().sum(0))


def _note_squares(rows: Tensor, out: Tensor) -> None:
    out.copy_(rows.contiguous().square().sum(1))


@dataclass(frozen=True)
class SubsetNorm(Rule):
    """A momentum over the norms of subsets (see the module's docstring).

    Bytes for an (m, n) weight: what the codec takes (4 m n in fp32), 4 max(m, n) and 4; with `size` k
    4 ceil(m n / k) in their place. With k = 1 it is Adam.

    Args:
        held: codec of the momentum; subsets: which elements share a second moment.

    Example:
        >>> {key: tuple(x.shape) for key, x in SubsetNorm.of("fp32").init(torch.zeros(3, 5)).items()}
        {'exp_avg': (3, 5), 'exp_avg_sq': (5,), 'age': ()}
    """

    held: Codec = field(default_factory=lambda: Floats(stream="exp_avg"))
    subsets: Subsets = field(default_factory=Subsets)
    reads_later: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, size: int = 0) -> SubsetNorm:
        """The rule with its momentum held as `states` says.

        Raises:
            UserError: a negative size.
        """
        return cls(codec(states, signed=True, stream="exp_avg"), Subsets(size))

    def init(self, x: Tensor) -> State:
        """Moments of zero, age 0."""
        age = torch.zeros((), dtype=torch.int32, device=x.device)
        return {**prefixed("exp_avg", self.held.init(x)), "exp_avg_sq": self.subsets.init(x), "age": age}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the momentum and on a subset."""
        return shape.shard.starts_on(self.held.grain) and self.subsets.shards(shape)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move the second moment; the momentum moves once the weight is written."""
        sums = self.subsets.sums(g, hp)
        ok = self.subsets.sound(sums, hp)
        s["age"].add_(ok)
        numbers = numbers_of(self.subsets, s["age"], hp)
        v = s["exp_avg_sq"]
        v.copy_(torch.where(ok, v + numbers[0] * (sums - v), v))
        moment, rate = HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp), 1.0 - hp.betas[0]
        step = self.subsets.divided(moment.towards(g, rate), v, numbers)
        return Direction(step, ok=ok, commit=moment.following(g, rate, ok))
