"""Modifiers that multiply a step by a number, according to its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.modifiers.modifier import NONE, Modifier
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class Limit(Modifier):
    """A step grows by so much at most (Fira, arXiv 2410.01623): |d| <= growth |d of the step before|.

    A step of length 0 neither sets a limit nor loosens one. Holds 12 bytes: the last length, and a sum.

    Args:
        growth: at least 1.

    Raises:
        UserError: a growth below 1.
    """

    growth: float = 1.01
    reads_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.growth >= 1.0:
            raise UserError(f"growth must be at least 1, got {self.growth}; 1.01 is usual")

    @property
    def sums(self) -> tuple[int, ...]:
        """The squares of the step."""
        return (2,)

    def init(self, x: Tensor) -> State:
        """The length of the step before; 0 before the first, which has no limit."""
        return {"norm": torch.zeros((), device=x.device)}

    def measure(
        self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE
    ) -> tuple[Tensor, ...]:
        """In double precision, where no square overflows."""
        return (d.double().square(),)

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """How much the step is shortened; the length that it has then."""
        norm, before = sums[0].sqrt(), s["norm"].double()
        most = before * self.growth
        longer = (before > 0.0) & (norm > most)
        new = torch.where(longer, most, torch.where(norm > 0.0, norm, before))
        return torch.where(longer, most / norm, 1.0), {"norm": new}


@dataclass(frozen=True)
class TrustRatio(Modifier):
    """Steps in units of the weight (LAMB, arXiv 1904.00962): d <- d |w| / |d|.

    Where either length is 0, d stays as it is; a quotient above 1e36 counts as 1e36. Decay is decoupled as
    everywhere here: it is not part of the step that is measured, and not multiplied. Holds 16 bytes for the
    sums.
    """

    reads_gradient: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True

    @property
    def sums(self) -> tuple[int, ...]:
        """The squares of the weight and of the step."""
        return 0, 2

    def measure(
        self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE
    ) -> tuple[Tensor, ...]:
        """In double precision, where no square overflows."""
        assert w is not None
        return w.double().square(), d.double().square()

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """The quotient of the lengths."""
        weight, step = sums
        return torch.where(weight * step > 0.0, (weight / step).sqrt(), 1.0), {}
