"""What a projection does not see, owed: it comes later, and nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.codecs.blockwise import Codec, Floats, codec
from lowmem.optim.contract import Residual
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.shards import Shape
from lowmem.optim.terms.fp32 import LARGEST_MOMENT
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.split import Commit, Split
from lowmem.optim.terms.state import Constants, State, part, prefixed


@dataclass(frozen=True)
class Feedback(Residual):
    """Owe the rest: add it to the next gradient (LDAdam, arXiv 2410.16103; DCT-AdamW, 2505.17967).

        A = G + E,  R = down(A),  E <- A - up(R)

    With `momentum` also what a change of basis takes from the momentum is owed, in gradients:
    E <- E + beta1 / (1 - beta1) (P_old M_old - P M). It lies beside the new basis, so that it may be
    added before A is projected. Nothing is lost, only late. Bytes for an (m, n) weight: what the codec
    takes, 4 m n in fp32, m n (1 + 4 / 256) in 8 bits.

    Args:
        held: codec of E.
        momentum: owe what the momentum loses; needs moments that follow the basis.

    Example:
        >>> sorted(Feedback.of("int4").init(torch.zeros(3, 5)))
        ['error.codes', 'error.scale']
    """

    held: Codec = field(default_factory=lambda: Floats(stream="error"))
    momentum: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"orthonormal"})

    @classmethod
    def of(cls, states: str, *, momentum: bool = False) -> Feedback:
        """What is owed held as `states` says."""
        return cls(codec(states, signed=True, stream="error"), momentum)

    @property
    def takes(self) -> str:
        """The momentum, if that is asked for."""
        return "exp_avg" if self.momentum else ""

    def init(self, x: Tensor, axis: int | None = None) -> State:
        """Nothing is owed."""
        return prefixed("error", self.held.init(x))

    def constants(self, shape: tuple[int, int]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def _owed(self, s: State, shape: tuple[int, int], hp: Hyper) -> HeldMoment:
        return HeldMoment(self.held, part(s, "error"), s, shape, hp)

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block of what is owed."""
        return shape.shard.starts_on(self.held.grain)

    def inject(self, s: State, g: Blocks, hp: Hyper) -> Blocks:
        """G + E."""
        owed = self._owed(s, g.shape, hp)
        return Formula(torch.add, (g, owed))

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """No step; what is not seen is owed. What is not finite is left to the frame to refuse."""
        refused = None if split.sees else Formula(_refused, (split.rest,))
        return refused, lambda: self._owed(s, split.g.shape, split.hp).moving(_rest, (split.rest,), split.ok)

    def take_(self, s: State, lost: Blocks, ok: Tensor, hp: Hyper) -> None:
        """What the momentum lost, in gradients."""
        more = _More(hp.betas[0] / (1.0 - hp.betas[0]))
        self._owed(s, lost.shape, hp).moving(more, (lost,), ok)


def _rest(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(new.isfinite(), new.clamp(-LARGEST_MOMENT, LARGEST_MOMENT), old)


def _refused(rows: Tensor) -> Tensor:
    """What is not finite, and nothing else."""
    return torch.where(rows.isfinite(), 0.0, rows)


@dataclass(frozen=True)
class _More:
    """What is owed and so many times what was lost."""

    gradients: float

    def __call__(self, old: Tensor, lost: Tensor) -> Tensor:
        return torch.add(old, lost, alpha=self.gradients)
