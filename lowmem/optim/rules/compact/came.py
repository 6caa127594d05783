"""CAME: row and column means of squares, and of how far steps lie from their average (arXiv 2307.02047).

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
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.codecs.factored import Factored, RowCol
from lowmem.optim.contract import Rule
from lowmem.optim.formulas import Formula, minus
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.compact.adafactor import between, quotient
from lowmem.optim.shards import Shape
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed, scoped


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

    held: Codec = field(default_factory=lambda: Floats(stream="exp_avg"))
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

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of the average; columns are averaged over all rows."""
        return shape.shard.starts_on(self.held.grain)

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
        return Direction(Formula(between, (d,), (p,), (q,)), ok=ok, commit=commit)

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
    return Formula(minus, (a, b))
