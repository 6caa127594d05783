"""What becomes of the part of a gradient that its projection does not see.

    rest = G - up(down(G))

A residual may add what it owes to the gradient before it is projected (`inject`)
and may turn the rest into a step of its own (`absorb`). Both work on `Blocks`,
so no full-size copy is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, State
from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD


class Residual(Protocol):
    """What becomes of the rest."""

    @property
    def reads_rest(self) -> bool:
        """Whether the rest is looked at; if not, only the projection of a gradient is needed."""

    def init(self, x: Tensor) -> State:
        """State for a tensor like x."""

    def inject(self, s: State, g: Blocks) -> Blocks:
        """The gradient with what is owed; pure, since a refresh and a step both call it."""

    def absorb(self, s: State, rest: Blocks) -> Blocks | None:
        """The step that the rest takes, or None."""

    def aside(self) -> AnyRule:
        """The rule of a tensor of which nothing is seen, because a schedule has put it aside.

        Raises:
            UserError: there is none.
        """


@dataclass(frozen=True)
class Drop:
    """Forget the rest (GaLore)."""

    reads_rest: bool = False

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def inject(self, s: State, g: Blocks) -> Blocks:
        """The gradient itself."""
        return g

    def absorb(self, s: State, rest: Blocks) -> Blocks | None:
        """No step."""
        return None

    def aside(self) -> AnyRule:
        """There is no rule that takes no step."""
        raise UserError("schedule=blocks steps what it puts aside: choose residual=sign or residual=sgd")


@dataclass(frozen=True)
class Stateless:
    """Step by the rest or by its sign, scaled (FRUGAL, arXiv 2411.07837).

    Args:
        sign: signSGD if True, SGD if False.
        scale: factor of the learning rate.
    """

    sign: bool = True
    scale: float = 1.0
    reads_rest: bool = True

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def inject(self, s: State, g: Blocks) -> Blocks:
        """The gradient itself."""
        return g

    def absorb(self, s: State, rest: Blocks) -> Blocks | None:
        """scale sign(rest) or scale rest; what is not finite stays so, for the frame to refuse."""

        def step(x: Tensor) -> Tensor:
            return (torch.where(x.isfinite(), x.sign(), x) if self.sign else x) * self.scale

        return rest.map(step)

    def aside(self) -> AnyRule:
        """The same step, of the whole gradient."""
        return coded(SGD(self.scale, sign=self.sign))
