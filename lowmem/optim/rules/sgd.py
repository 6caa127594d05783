"""Rules without moments: the gradient itself, or its sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.elementwise import Beside, Elementwise, Moments


@dataclass(frozen=True)
class SGD(Elementwise):
    """Gradient descent, d = scale g, or signSGD, d = scale sign(g). Holds nothing; sign(0) is 0.

    Args:
        scale: factor of the learning rate.
        sign: step by the sign of the gradient alone.

    Example:
        >>> import torch
        >>> from lowmem.optim.elementwise import coded
        >>> coded(SGD()).init(torch.zeros(2, 2))
        {}
    """

    scale: float = 1.0
    sign: bool = False
    ages: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The gradient or its sign, scaled."""
        return (g.sign() if self.sign else g) * self.scale
