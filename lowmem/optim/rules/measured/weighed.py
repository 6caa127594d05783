"""Rules that hold a gradient against the weight itself, and so cannot step inside a subspace.

    AdamP   leaves out of a step what only changes the length of a weight whose length is free

All sums are found in one pass over the tensor, in double precision. A tensor in which one
element is not finite takes no step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import Rule
from lowmem.optim.elementwise import Coded, coded
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula, together
from lowmem.optim.held import HeldMoment
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.measured.measured import size
from lowmem.optim.shards import Shape
from lowmem.optim.terms.fp32 import LARGEST_MOMENT
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part

LEAST_SQUARE = 1e-300
"""What sums of squares in fp64 are divided by at least."""


@dataclass(frozen=True)
class AdamP(Rule):
    """Adam that spends no step on the length of a weight that is normalised afterwards (arXiv 2006.08217).

        u = m_hat / (sqrt(v_hat) + eps)
        where |cos(g, w)| < delta / sqrt(n) for all rows w:  u <- u - w <u, w> / (|w| + eps)^2, row by row,
        else where it holds for the tensor as one row:       the same for all of it;  decay <- wd_ratio decay

    Gradients of a weight whose length does not matter stand at right angles to it, and each step of momentum
    makes it longer. A gradient of zeros stands at right angles to nothing. Vectors count as one row; the
    paper leaves them to Adam. In language models without a norm after each matrix this is Adam nearly always.
    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        held: Adam, and how its moments are held.
        delta: how near to a right angle is near enough, above 0.
        wd_ratio: what is left of the decay then, in [0, 1].

    Example:
        >>> sorted(AdamP.of("fp32").init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq']
    """

    held: Coded = field(default_factory=lambda: coded(Adam()))
    delta: float = 0.1
    wd_ratio: float = 0.1
    reads_later: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, delta: float = 0.1, wd_ratio: float = 0.1) -> AdamP:
        """AdamP with its moments held as `states` says.

        Raises:
            UserError: a number outside its range.
        """
        if not delta > 0.0 or not 0.0 <= wd_ratio <= 1.0:
            raise UserError(f"adamp: delta > 0 and wd_ratio in [0, 1], got {delta} and {wd_ratio}")
        return cls(coded(Adam(), states), delta, wd_ratio)

    def init(self, x: Tensor) -> State:
        """Both moments, and their age."""
        return self.held.init(x)

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return self.held.constants(shape)

    def shards(self, shape: Shape) -> bool:
        """Where the moments do: a row is here whole, and sums of all go over all."""
        return self.held.shards(shape)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find what is left out of each row; the rest is left to the write."""
        _, _, eps, correction1, correction2 = numbers_of(self.held.rule, s["age"] + 1, hp).unbind()
        rate1, rate2 = (1.0 - beta for beta in hp.betas)
        first, second = (
            HeldMoment(codec, part(s, name), s, g.shape, hp)
            for name, codec in zip(Adam.moments, self.held.codecs, strict=True)
        )
        squared, w = Formula(torch.square, (g,)), hp.weight
        moved = (first.towards(g, rate1), second.towards(squared, rate2))
        adam = Formula(_adam, moved, across=(eps, correction1, correction2))
        found = torch.zeros(g.shape[0], 4, dtype=torch.float64, device=g.device)
        hp.sweep(_note_dots, Formula(together, (g, w, adam)), (found,))
        share, near, ok = self._share(found.t(), g, hp)
        blocks = Formula(_less, (adam, w), (share,))
        usual = hp.rates(dtype=torch.float64)[1]
        less = 1.0 - (1.0 - usual) * self.wd_ratio

        def commit() -> None:
            first.following(g, rate1, ok)()
            second.following(squared, rate2, ok)()
            s["age"].add_(ok)

        return Direction(blocks, decay=torch.where(near, less, usual), ok=ok, commit=commit)

    def _share(self, dots: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """What of each row's weight is taken out of its step, (m,); whether any is; whether all is finite.

        Args:
            dots: <g, g>, <g, w>, <w, w> and <u, w> of each row, (4, m) fp64.
            g: the gradient.
        """
        whole = hp.total(dots.sum(1, keepdim=True))
        ok = whole[0, 0] <= LARGEST_MOMENT
        widest = _cosine(dots).amax() if dots.numel() else whole.new_zeros(())
        rows = hp.total(widest, "max") < self.delta / g.shape[1] ** 0.5
        tensor = _cosine(whole)[0] < self.delta / size(g, hp) ** 0.5
        near = (rows | tensor) & (whole[0, 0] > 0.0) & ok
        each, one = (x[3] / (x[2].sqrt() + hp.eps).square().clamp(min=LEAST_SQUARE) for x in (dots, whole))
        share = torch.where(near, torch.where(rows, each, one), 0.0)
        return share.float(), near, ok


def _adam(m: Tensor, v: Tensor, eps: Tensor, correction1: Tensor, correction2: Tensor) -> Tensor:
    return m * correction1 / (v.sqrt() * correction2 + eps)


def _less(step: Tensor, w: Tensor, share: Tensor) -> Tensor:
    return step - share * w


def _note_dots(g: Tensor, w: Tensor, step: Tensor, found: Tensor) -> None:
    """<g, g>, <g, w>, <w, w> and <u, w> of rows."""
    taken = (step * w).contiguous().sum(1, dtype=torch.float64)
    x, y = g.double(), w.double()
    found.copy_(torch.stack([(x * x).sum(1), (x * y).sum(1), (y * y).sum(1), taken], 1))


def _cosine(dots: Tensor) -> Tensor:
    """|cos(g, w)| of each column of <g, g>, <g, w> and <w, w>; 0 beside zeros."""
    lengths = (dots[0] * dots[2]).sqrt()
    return torch.where(lengths > 0.0, dots[1].abs() / lengths, 0.0)
