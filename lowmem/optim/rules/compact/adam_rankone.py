"""Adam with its second moment in 4 bits, under scales of rows and columns (arXiv 2309.01507).

A code of few bits keeps a first moment that should decay, beside larger ones of its block, while V
decays with its row or column: the steps of what has no gradient any more would grow without end.
Adam's own first moment is seldom above one root of V, so that of a block is held to two.

A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.codecs.rankone import RankOne, maxima
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.shards import Shape
from lowmem.optim.terms.fp32 import LARGEST_MEAN
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed, scoped

ROOTS = 2.0
"""Of V: how large a coded first moment may be."""


@dataclass(frozen=True)
class AdamRankOne(Rule):
    """Adam with its second moment in 4 bits under scales of rows and columns (arXiv 2309.01507).

    The arithmetic is Adam's, in fp32; a coded first moment is at most two roots of V. V is decoded before it,
    row block by row block, and encoded after the write (`RankOne`). Bytes for an (m, n) weight:
    ceil(m n / 2) + 4 (m + n) + 4, and what the codec takes for the first moment,
    ceil(m n / 2) + 4 ceil(m n / 128) in 4 bits.

    Args:
        held: codec of the first moment; second: how the second is held.

    Example:
        >>> sorted(AdamRankOne.of("bf16").init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq.codes', 'exp_avg_sq.col', 'exp_avg_sq.row']
    """

    held: Codec = field(default_factory=lambda: Floats(stream="exp_avg"))
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

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block, and on a whole byte of the second moment."""
        return shape.shard.starts_on(math.lcm(2, self.held.grain))

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """The new scales take a pass; both moments move after the write."""
        beta1, beta2 = hp.betas
        square, moment = scoped(s, "exp_avg_sq"), HeldMoment(self.held, part(s, "exp_avg"), s, g.shape, hp)

        def squares(i: int, j: int) -> Tensor:
            return self.second.rows(square, i, j).lerp_(g.rows(i, j).square(), 1.0 - beta2)

        v = Blocks(g.shape, squares, g.device)
        new = maxima(v, hp)
        ok = new["col"].amax() <= LARGEST_MEAN
        s["age"].add_(ok)
        _, _, eps, correction1, correction2 = numbers_of(self.adam, s["age"], hp).unbind()

        def average(old: Tensor, g: Tensor, root: Tensor) -> Tensor:
            x = old + (1.0 - beta1) * (g - old)
            if self.held.grain == 1:
                return x
            limit = root * (ROOTS * correction2 / correction1)
            return torch.minimum(torch.maximum(x, -limit), limit)

        def step(i: int, j: int) -> Tensor:
            root = v.rows(i, j).sqrt_()
            m = average(moment.rows(i, j), g.rows(i, j), root)
            return m.mul_(correction1).div_(root.mul_(correction2).add_(eps))

        def moved(old: Tensor, start: int, stop: int) -> Tensor:
            return average(old, g.chunk(start, stop).float(), v.chunk(start, stop).sqrt())

        def commit() -> None:
            moment.move_(moved, ok)
            self.second.store_(square, v, new, ok)

        return Direction(Blocks(g.shape, step, g.device), ok=ok, commit=commit)
