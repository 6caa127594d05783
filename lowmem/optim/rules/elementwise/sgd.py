"""Rules without second moments: the gradient itself, its sign, or its average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.hyper import Hyper


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

    @property
    def linear(self) -> bool:
        """The gradient is in units of itself, its sign is not."""
        return not self.sign

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The gradient or its sign, scaled."""
        return (g.sign() if self.sign else g) * self.scale


@dataclass(frozen=True)
class AverageGradient(Elementwise):
    """Momentum as an average of gradients: m <- m + (1 - beta1)(g - m),  d = m / (1 - beta1^t).

    Bytes for an (m, n) weight in fp32: 4 m n + 4.

    Args:
        bias_correction: divide by 1 - beta1^t; without, the first steps are short.

    Example:
        >>> sorted(AverageGradient.moments)
        ['exp_avg']
    """

    bias_correction: bool = True
    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment()}
    uses: ClassVar[frozenset[str]] = frozenset({"betas"})

    @property
    def linear(self) -> bool:
        """An average of gradients is one."""
        return True

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, and what the bias correction multiplies by."""
        beta1 = hp.betas[0]
        return 1.0 - beta1, 1.0 / (1.0 - beta1**t) if self.bias_correction else 1.0

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average."""
        return {"exp_avg": m["exp_avg"] + x.numbers[0] * (g - m["exp_avg"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The average, without its bias."""
        return m["exp_avg"] * x.numbers[1]
