"""What a projection does not see, forgotten or made a step of its own.

    rest = G - up(down(G))

What a residual makes of it (`absorb`) works on `Blocks`, so no full-size copy is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, Residual, Rule
from lowmem.optim.elementwise import coded
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.compact.subsets import Subsets
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.shards import Shape, shard_in, total
from lowmem.optim.terms.fp32 import LARGEST_MEAN
from lowmem.optim.terms.split import Commit, Split
from lowmem.optim.terms.state import State, apply_in_place


@dataclass(frozen=True)
class Rest(Rule):
    """The rule of a tensor that is put aside: no step, no decay, no gradient, no state."""

    idle: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()


@dataclass(frozen=True)
class Drop(Residual):
    """Forget the rest (GaLore)."""

    reads_rest: ClassVar[bool] = False

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def aside(self) -> AnyRule:
        """No step."""
        return Rest()


@dataclass(frozen=True)
class Stateless(Residual):
    """Step by the rest or by its sign, scaled (FRUGAL, arXiv 2411.07837).

    Args:
        sign: signSGD if True, SGD if False.
        scale: factor of the learning rate.
    """

    sign: bool = True
    scale: float = 1.0

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """scale sign(rest) or scale rest; what is not finite stays so, for the frame to refuse."""
        return Formula(self.of, (split.rest,)), None

    def of(self, x: Tensor) -> Tensor:
        """The step of rows of the rest."""
        return (torch.where(x.isfinite(), x.sign(), x) if self.sign else x) * self.scale

    def aside(self) -> AnyRule:
        """The same step, of the whole gradient."""
        return coded(SGD(self.scale, sign=self.sign))


@dataclass(frozen=True)
class ScaledRest(Residual):
    """Step by the rest, each channel as much longer as the inner rule makes it (Fira, arXiv 2410.01623).

        phi_j = |N_j| / (|R_j| + 1e-8),  d = scale phi_j rest_j,  |d| <= limit |d of the step before|

    A channel is a column of a gradient that is projected on the left, a row of one that
    is projected on the right. Bias correction is part of N, hence of phi.

    Holds 4 bytes where there is a limit, and looks at the rest once more for its norm.

    Args:
        scale: factor of the learning rate, above 0.
        limit: how much longer than the step before a step may be, at least 1; 0 for no limit.
        per: "channel", or "tensor" for one factor for all (APOLLO-Mini).

    Raises:
        UserError: a number or word outside its range.
    """

    scale: float = 1.0
    limit: float = 1.01
    per: str = "channel"
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})

    def __post_init__(self) -> None:
        if not self.scale > 0.0 or not (self.limit == 0.0 or self.limit >= 1.0):
            raise UserError(
                f"scale must be above 0 and limit at least 1, or 0 for none, got {self.scale}, {self.limit}"
            )
        if self.per not in PER:
            raise UserError(f"unknown per {self.per!r}; {nearest(self.per, PER)}")

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def init(self, x: Tensor) -> State:
        """The norm of the step before; 0 before the first, which has no limit."""
        return {"norm": torch.zeros((), device=x.device)} if self.limit else {}

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The scaled step, and its norm for the next one."""
        factors = self._factors(split).mul_(self.scale)
        if not self.limit:
            return self._scaled(split, factors), None
        norms = torch.empty(split.g.shape[0], dtype=torch.float64, device=split.g.device)
        split.hp.sweep(_note_norms, self._scaled(split, factors), (norms,))
        norm = total(split.g.shape, norms.square().sum()).sqrt().float()
        before, most = s["norm"], s["norm"] * self.limit
        longer = (before > 0.0) & (norm > most)
        factors.mul_(torch.where(longer, most / norm, 1.0))
        new = torch.where(split.ok, torch.minimum(norm, torch.where(longer, most, norm)), before)
        return self._scaled(split, factors), lambda: apply_in_place(s, {"norm": new})

    def _factors(self, split: Split) -> Tensor:
        """phi, one for each row or column of the gradient."""
        own, seen = (torch.linalg.vector_norm(x, dim=split.axis) for x in (split.step, split.low))
        if self.per == "tensor":
            own, seen = (_length(x, split).expand_as(own) for x in (own, seen))
        factors: Tensor = own / (seen + 1e-8)
        return factors

    def _scaled(self, split: Split, factors: Tensor) -> Blocks:
        source = split.rest if self.lifts else split.g

        down, across = ((), (factors,)) if split.axis == 0 else ((factors,), ())
        return Formula(torch.mul, (source,), down, across)


PER = ("channel", "tensor")


def _length(channels: Tensor, split: Split) -> Tensor:
    """The norm of all channels; where they are rows, of those of all ranks."""
    norm: Tensor = torch.linalg.vector_norm(channels)
    shard = shard_in(split.g.shape)
    return norm if shard is None or split.axis == 0 else shard.total(norm.square()).sqrt()


def _note_norms(rows: Tensor, norms: Tensor) -> None:
    norms.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))


@dataclass(frozen=True)
class ScaledGradient(ScaledRest):
    """Step by the whole gradient, scaled like that, and by nothing else (APOLLO, arXiv 2412.05270).

    The subspace is a sketch that serves statistics alone: nothing is lifted.
    """

    lifts: ClassVar[bool] = False


@dataclass(frozen=True)
class SubsetNormed(Residual):
    """Step by the rest and what is seen, both over the norms of subsets (AdamSNSM, arXiv 2411.07120).

        v_i <- beta2 v_i + (1 - beta2) sum of g^2 over subset i
        d = (scale up(N) + rest) / (1 - beta1^t) / (sqrt(v_i / (1 - beta2^t)) + eps)

    N must be in units of the gradient; published with a momentum without bias correction (that of
    `AverageGradient`), since the sum is corrected. Holds 4 max(m, n) + 4 bytes, or
    4 ceil(m n / k) + 4 for subsets of k elements.

    Args:
        subsets: which elements share a second moment.
    """

    subsets: Subsets = field(default_factory=Subsets)
    lifts: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"orthonormal"})
    needs_linear: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"betas", "eps"})

    def init(self, x: Tensor) -> State:
        """A second moment of zero, age 0."""
        age = torch.zeros((), dtype=torch.int32, device=x.device)
        return {"exp_avg_sq": self.subsets.init(x), "age": age}

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a subset."""
        return self.subsets.shards(shape)

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The whole step; a subset that has an element that is not finite keeps its moment."""
        age = s["age"] + split.ok
        numbers = numbers_of(self.subsets, age, split.hp)
        sums, old = self.subsets.sums(split.g, split.hp), s["exp_avg_sq"]
        v = torch.where(split.ok & (sums <= LARGEST_MEAN), old + numbers[0] * (sums - old), old)

        def rows(i: int, j: int) -> Tensor:
            return split.lifted.rows(i, j) * split.scale + split.rest.rows(i, j)

        step = self.subsets.divided(Blocks(split.g.shape, rows, split.g.device), v, numbers)
        return step, lambda: apply_in_place(s, {"exp_avg_sq": v, "age": age})
