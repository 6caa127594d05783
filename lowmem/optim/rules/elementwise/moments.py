"""Element-wise rules with one moment, for rules that need the whole tensor to combine.

A rule that reduces over a tensor still does its element-wise work through the
frame: it hands one of these to `Hyper.advance`, or lets its `Direction` end in
one. Their age is that of the rule that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class Square(Elementwise):
    """The full second moment of a vector, and the gradient divided by its root.

    v <- v + t^decay_rate (g^2 + eps - v),  d = g / sqrt(v)

    Args:
        decay_rate: exponent of the average, below 0.
        eps: added to g^2.
    """

    decay_rate: float = -0.8
    eps: float = 1e-30
    moments: ClassVar[Mapping[str, Moment]] = {"square": Moment(signed=False)}
    compilable: ClassVar[bool] = False  # vectors are few and short
    uses: ClassVar[frozenset[str]] = frozenset()

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """How far the average moves, all the way at the first step; and eps."""
        return t**self.decay_rate, self.eps

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average of squares."""
        rate, eps = x.numbers
        return {"square": m["square"] + rate * (g * g + eps - m["square"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        return g * m["square"].clamp(min=TINY).rsqrt()


@dataclass(frozen=True)
class Momentum(Elementwise):
    """An average of steps, with the step size inside: m <- m + (1 - beta)(rate u - m), d = m.

    Args:
        beta: share of the old m, in (0, 1).
    """

    beta: float
    moments: ClassVar[Mapping[str, Moment]] = {"momentum": Moment()}
    ages: ClassVar[bool] = False
    given: ClassVar[tuple[str, ...]] = ("rate",)
    uses: ClassVar[frozenset[str]] = frozenset()

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta."""
        return (1.0 - self.beta,)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average."""
        share, rate = x.numbers
        return {"momentum": m["momentum"] + share * (rate * g - m["momentum"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The average itself."""
        return m["momentum"]


@dataclass(frozen=True)
class Average(Elementwise):
    """m <- m + share (g - m),  d = rate m."""

    moments: ClassVar[Mapping[str, Moment]] = {"momentum": Moment()}
    ages: ClassVar[bool] = False
    given: ClassVar[tuple[str, ...]] = ("share", "rate")
    uses: ClassVar[frozenset[str]] = frozenset()

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """A number that nobody reads: there is always one before what is given."""
        return (0.0,)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average."""
        return {"momentum": m["momentum"] + x.numbers[1] * (g - m["momentum"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """In units of the rate."""
        return m["momentum"] * x.numbers[2]


@dataclass(frozen=True)
class Sum(Elementwise):
    """m <- beta1 m + rate g,  d = m."""

    moments: ClassVar[Mapping[str, Moment]] = {"momentum": Moment()}
    ages: ClassVar[bool] = False
    given: ClassVar[tuple[str, ...]] = ("rate",)
    uses: ClassVar[frozenset[str]] = frozenset({"betas"})

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """beta1."""
        return (hp.betas[0],)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The sum."""
        beta1, rate = x.numbers
        return {"momentum": beta1 * m["momentum"] + rate * g}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The sum itself."""
        return m["momentum"]
