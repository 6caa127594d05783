"""Adam-mini: one second moment for each row, or head (arXiv 2406.16793).

A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Direction, matrix_shape
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.normalised.rows import row_squares
from lowmem.optim.shards import Shape
from lowmem.optim.terms.fp32 import LARGEST_MEAN, LEAST_EPS
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


def _note_means(rows: Tensor, squares: Tensor) -> None:
    squares.copy_(row_squares(rows) / rows.shape[1])


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

    held: Codec = field(default_factory=lambda: Floats(stream="exp_avg"))
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

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the average."""
        return shape.shard.starts_on(self.held.grain)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move the second moments; the first moves after the write."""
        squares, v = torch.empty(g.shape[0], device=g.device), s["exp_avg_sq"]
        hp.sweep(_note_means, g, (squares,))
        top = squares.amax() if squares.numel() else squares.new_zeros(())
        ok = hp.total(top, "max") <= LARGEST_MEAN
        s["age"].add_(ok)
        rate2, eps, correction1, correction2 = numbers_of(self, s["age"], hp).unbind()
        v.lerp_(torch.where(ok, squares, v), rate2)
        share = correction1 / (self._of_blocks(v, g, hp).sqrt() * correction2 + eps)
        moment = HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp)
        rate1 = 1.0 - hp.betas[0]
        m = moment.towards(g, rate1)
        d = Formula(torch.mul, (m,), (share,))
        return Direction(d, ok=ok, commit=moment.following(g, rate1, ok))

    @staticmethod
    def _of_blocks(v: Tensor, g: Blocks, hp: Hyper) -> Tensor:
        """Second moments of rows, the mean of its head for each row of a query or key weight."""
        if hp.heads < 2 or g.shape != hp.weight.shape:  # in a subspace, rows are directions
            return v
        if hp.shard is None:
            return v.view(hp.heads, -1).mean(1).repeat_interleave(v.numel() // hp.heads)
        size = hp.shard.full[0] // hp.heads  # a head may lie on several ranks
        head = torch.arange(hp.shard.first, hp.shard.first + v.numel(), device=v.device) // size
        return (hp.total(v.new_zeros(hp.heads).index_add_(0, head, v)) / size)[head]
