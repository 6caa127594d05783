"""Rules without state: the gradient itself, or its sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.contract import Change, ChunkHyper, Hyper, State


@dataclass(frozen=True)
class SGD:
    """Gradient descent, d = scale g, or signSGD, d = scale sign(g). Holds nothing; sign(0) is 0.

    Args:
        scale: factor of the learning rate.
        sign: step by the sign of the gradient alone.

    Example:
        >>> SGD().init(torch.zeros(2, 2))
        {}
    """

    scale: float = 1.0
    sign: bool = False
    grain: int = 1
    streams: tuple[str, ...] = ()
    compilable: bool = True
    uses: ClassVar[frozenset[str]] = frozenset()

    @property
    def per(self) -> Mapping[str, int]:
        """Nothing is cut."""
        return {}

    @property
    def fill(self) -> Mapping[str, int]:
        """Nothing is padded."""
        return {}

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def shared(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """None are needed."""
        return hp.vector(0.0, dtype=torch.float32)

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The gradient or its sign, scaled."""
        return (g.sign() if self.sign else g) * self.scale, {}

    def moments(self, s: State) -> State:
        """None."""
        return {}

    def check_rebase(self, kind: str) -> None:
        """Nothing is held: every change of basis is fine."""

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Nothing is held."""
