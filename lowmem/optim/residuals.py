"""What becomes of the part of a gradient that its projection does not see.

    rest = G - up(down(G))

A residual may add what it owes to the gradient before it is projected (`inject`)
and may turn the rest into a step of its own (`absorb`). Both work on `Blocks`,
so no full-size copy is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, Commit, Residual, Rest, Split
from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.shards import shard_in, total
from lowmem.optim.state import State, apply_in_place


@dataclass(frozen=True)
class Drop(Residual):
    """Forget the rest (GaLore)."""

    shards: ClassVar[bool] = True
    reads_rest: ClassVar[bool] = False

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
    shards: ClassVar[bool] = True

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """scale sign(rest) or scale rest; what is not finite stays so, for the frame to refuse."""

        def step(x: Tensor) -> Tensor:
            return (torch.where(x.isfinite(), x.sign(), x) if self.sign else x) * self.scale

        return split.rest.map(step), None

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
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.scale > 0.0 or not (self.limit == 0.0 or self.limit >= 1.0):
            raise UserError(
                f"scale must be above 0 and limit at least 1, or 0 for none, got {self.scale}, {self.limit}"
            )
        if self.per not in PER:
            raise UserError(f"unknown per {self.per!r}; {nearest(self.per, PER)}")

    def init(self, x: Tensor) -> State:
        """The norm of the step before; 0 before the first, which has no limit."""
        return {"norm": torch.zeros((), device=x.device)} if self.limit else {}

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The scaled step, and its norm for the next one."""
        factors = self._factors(split).mul_(self.scale)
        if not self.limit:
            return self._scaled(split, factors), None
        norm = total(split.g.shape, self._scaled(split, factors).sum(_square)).sqrt().float()
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

        def rows(i: int, j: int) -> Tensor:
            return source.rows(i, j) * (factors if split.axis == 0 else factors[i:j, None])

        return Blocks(source.shape, rows, source.device)


PER = ("channel", "tensor")


def _length(channels: Tensor, split: Split) -> Tensor:
    """The norm of all channels; where they are rows, of those of all ranks."""
    norm: Tensor = torch.linalg.vector_norm(channels)
    shard = shard_in(split.g.shape)
    return norm if shard is None or split.axis == 0 else shard.total(norm.square()).sqrt()


def _square(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()


@dataclass(frozen=True)
class ScaledGradient(ScaledRest):
    """Step by the whole gradient, scaled like that, and by nothing else (APOLLO, arXiv 2412.05270).

    The subspace is a sketch that serves statistics alone: nothing is lifted.
    """

    lifts: ClassVar[bool] = False
