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

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import State


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


RESIDUALS = ("drop", "sign", "sgd")


def residual(word: str, scale: float = 1.0) -> Residual:
    """The residual named by one word: drop, sign or sgd.

    Args:
        word: its name.
        scale: of the learning rate of sign and sgd.

    Raises:
        UserError: unknown word.
    """
    if word not in RESIDUALS:
        raise UserError(f"unknown residual {word!r}; {nearest(word, RESIDUALS)}")
    return Drop() if word == "drop" else Stateless(word == "sign", scale)
