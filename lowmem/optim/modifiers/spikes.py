"""Modifiers against spikes of the gradient, and against what they leave in the moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.terms.hyper import Hyper, stagger
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class SpikeClip(Modifier):
    """Clip what stands out from its own history (SPAM, arXiv 2501.06842): |g| <= sqrt(threshold v).

    v is the second moment before this step, without bias correction. The first steps of a moment, and an
    element whose v is 0, have no history to be judged by: the paper clips where t mod D >= guard, with t
    from 0 as everywhere here, so that as many steps are free at the start as after a reset. Holds nothing.

    Args:
        threshold: of g^2 over v, above 0.
        guard: steps of a moment in which nothing is clipped, at least 1.

    Raises:
        UserError: a number outside its range.
    """

    threshold: float = 5000.0
    guard: int = 20
    needs: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        if not self.threshold > 0.0 or self.guard < 1:
            raise UserError(
                f"threshold must be above 0 and guard at least 1, got {self.threshold}, {self.guard}"
            )

    def before(self, g: Tensor, moments: Mapping[str, Tensor], age: Tensor) -> Tensor:
        """The clipped gradient."""
        square = moments["exp_avg_sq"]
        most = square.sqrt() * self.threshold**0.5
        judged = (age > self.guard) & (square > 0.0)
        return torch.where(judged, torch.minimum(torch.maximum(g, -most), most), g)


LEAST = 0.01
"""The factor of the first step after a reset."""


@dataclass(frozen=True)
class MomentumReset(Modifier):
    """Forget the moments now and then, and take short steps after it (SPAM, arXiv 2501.06842).

        every `gap` steps: moments 0, age 0
        d <- phi(c) d,   phi(c) = 1 - 0.99 (1 + cos(pi c / (warmup + 1))) / 2,   c steps after the reset

    Tensors take turns, as with every refresh; before its first reset a tensor's steps are as they are.
    The bias corrections start afresh with the moments, which the released code forgets to do. Holds 4
    bytes, none without warmup.

    Args:
        gap: steps between resets, at least 1; warmup: steps until they are as long as before, at least 0.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> [round(MomentumReset(500, 3).factor_at(c), 2) for c in range(5)]
        [0.01, 0.15, 0.51, 1.0, 1.0]
    """

    gap: int = 500
    warmup: int = 150
    reads_gradient: ClassVar[bool] = False
    resets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gap < 1 or self.warmup < 0:
            raise UserError(f"gap must be at least 1 and warmup at least 0, got {self.gap}, {self.warmup}")

    @property
    def paces(self) -> bool:
        """Where steps are short after a reset."""
        return self.warmup > 0

    def init(self, x: Tensor) -> State:
        """The factor of the step."""
        return {"pace": torch.ones((), device=x.device)} if self.warmup else {}

    def factor_at(self, since: int) -> float:
        """phi, so many steps after a reset."""
        if since >= self.warmup:
            return 1.0
        return 1.0 - (1.0 - LEAST) * 0.5 * (1.0 + math.cos(math.pi * since / (self.warmup + 1)))

    def begin_(self, s: State, hp: Hyper) -> bool:
        """Nothing is to be forgotten at the first step of a run."""
        since = (hp.step + stagger(hp.name, self.gap)) % self.gap
        if self.warmup:
            s["pace"].fill_(self.factor_at(since) if since < hp.step else 1.0)
        return since == 0 and hp.step > 0

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """What the clock said."""
        return (s["pace"] if self.warmup else torch.ones(())), {}
