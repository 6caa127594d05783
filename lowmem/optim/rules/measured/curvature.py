"""Rules that go by the curvature, which a probe finds now and then.

A probe differentiates the loss of labels that the model draws itself: the mean of the squares of such
gradients is the diagonal of the Gauss-Newton matrix. The optimizer asks for it (`Informed.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.elementwise import Beside, Coded, Elementwise, Moment, Moments, coded
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.measured.measured import Measured
from lowmem.optim.terms.changes import Rotation
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

LEAST_CURVATURE = 1e-15


@dataclass(frozen=True)
class Clipped(Elementwise):
    """m <- m + (1 - beta1)(g - m),  d = clip(m / (rho h), 1).

    Args:
        rho: of the curvature.
    """

    rho: float = 0.04
    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "hessian": Moment(signed=False)}
    ages: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset({"betas"})

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, rho."""
        return 1.0 - hp.betas[0], self.rho

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The momentum; the curvature stays until a probe."""
        return {"exp_avg": m["exp_avg"] + x.numbers[0] * (g - m["exp_avg"]), "hessian": m["hessian"]}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """One at most."""
        return (m["exp_avg"] / (x.numbers[1] * m["hessian"] + LEAST_CURVATURE)).clamp(-1.0, 1.0)

    def rotated(self, m: Mapping[str, Tensor], turn: Rotation, age: Tensor, hp: Hyper) -> dict[str, Tensor]:
        """The curvature as a diagonal turns that has no mean."""
        return {"exp_avg": turn(m["exp_avg"]), "hessian": turn.squares(m["hessian"])}


@dataclass(frozen=True)
class Sophia(Measured):
    """Momentum over the curvature, element by element, and no element farther than lr (arXiv 2305.14342).

        M <- M + (1 - beta1)(G - M);  at every k-th step  H <- H + (1 - beta2)(B P^2 - H)
        D = clip(M / (rho H), 1)

    P is the gradient of the mean loss over B labels that are drawn from the model's own distribution
    (Gauss-Newton-Bartlett); B belongs to H here, where published code multiplies by it at each step. Where
    the curvature is not known yet, a step is the sign of M. The paper takes betas (0.965, 0.99).
    Bytes for an (m, n) weight in fp32: 8 m n.

    Args:
        held: the momentum and the curvature, and how they are held.
        every: k, at least 1.

    Example:
        >>> import torch
        >>> sorted(Sophia.of("int8").init(torch.zeros(3, 5)))
        ['exp_avg.codes', 'exp_avg.scale', 'hessian.codes', 'hessian.scale']
    """

    held: Coded = field(default_factory=lambda: coded(Clipped()))
    every: int = 10
    turns: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, rho: float = 0.04, every: int = 10) -> Sophia:
        """Sophia with momentum and curvature held as `states` says.

        Raises:
            UserError: a number outside its range.
        """
        if not rho > 0.0 or every < 1:
            raise UserError(f"sophia: rho > 0 and every >= 1, got {rho} and {every}")
        return cls(coded(Clipped(rho), states), every)

    @property
    def probes(self) -> int:
        """k."""
        return self.every

    def sense_(self, g: Blocks, s: State, hp: Hyper, count: Tensor) -> None:
        """Move the curvature; a probe in which an element is not finite says nothing."""
        squared = Formula(_counted, (g,), across=(count.float(),))
        ok = hp.parts(_broken, g, dtype=torch.int64).sum() == 0
        self.moment("hessian", g, s, hp).following(squared, 1.0 - hp.betas[1], ok)()

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Left to the write."""
        return Direction(g, then=(self.held, {key: s[key] for key in sorted(s)}))


def _counted(rows: Tensor, count: Tensor) -> Tensor:
    return rows.square() * count


def _broken(rows: Tensor) -> Tensor:
    return (~rows.isfinite()).sum()
