"""Rules that judge a gradient by its momentum, or keep the momenta that mattered: TAM, critical momenta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.elementwise import Beside, Coded, Moment, Moments, coded
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Sum
from lowmem.optim.rules.measured.measured import Found, Measured, squares, total
from lowmem.optim.terms.fp32 import LARGEST_MOMENT
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class AdaTorque(Adam):
    """Adam whose first moment sees rate g; `rate` is given."""

    given: ClassVar[tuple[str, ...]] = ("rate",)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Both averages."""
        first = m["exp_avg"]
        moved = super().move(g, m, x)
        return {**moved, "exp_avg": torch.addcmul(first, x.numbers[5] * g - first, x.numbers[0])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Adam's."""
        return super().direction(g, m, old, Beside(x.numbers[:5], x.lr))


@dataclass(frozen=True)
class TAM(Measured):
    """Momentum to which a gradient adds as far as it points the same way (arXiv 2412.18790).

        s <- gamma s + (1 - gamma) <M, G> / (|M| |G|),  c = eps + (1 + s) / 2
        M <- beta1 M + c G,  D = M
        adaptive:  M <- beta1 M + (1 - beta1) c G,  D = M_hat / (sqrt(v_hat) + eps)

    The cosine is that of whole tensors, and 0 where one of them is 0. That the averages of the adaptive
    form are corrected as Adam's is decided here; without, the first steps are 16 lr long. c is near a half
    where gradients have nothing to do with each other: take twice AdamW's lr.
    Bytes for an (m, n) weight in fp32: 4 m n + 4, adaptive 8 m n + 8.

    Args:
        gamma: share of the old s, in [0, 1).

    Example:
        >>> sorted(TAM.of("fp32").init(torch.zeros(3, 5)))
        ['alignment', 'momentum']
    """

    held: Coded = field(default_factory=lambda: coded(Sum()))
    gamma: float = 0.9
    turns: ClassVar[bool] = True
    on_rows: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[str]:
        """Those of its moments, and eps for the rate."""
        return frozenset(self.held.uses) | {"eps"}

    @classmethod
    def of(cls, states: str, *, adaptive: bool = False, gamma: float = 0.9) -> TAM:
        """TAM, or AdaTAM, with its moments held as `states` says.

        Raises:
            UserError: a gamma outside [0, 1).
        """
        if not 0.0 <= gamma < 1.0:
            raise UserError(f"tam: gamma lies in [0, 1), got {gamma}")
        return cls(coded(AdaTorque() if adaptive else Sum(), states), gamma)

    def init(self, x: Tensor) -> State:
        """The moments, and s = 0."""
        return {**super().init(x), "alignment": torch.zeros((), device=x.device)}

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """How far the gradient counts."""
        m = self.moment(next(iter(self.held.rule.moments)), g, s, hp)
        dot, gg, mm = total(_aligned, (g, m), hp, count=3)
        length, ok = (gg * mm).sqrt(), gg.isfinite()
        cosine = torch.where(length > 0.0, dot / length, 0.0)
        alignment = (self.gamma * s["alignment"] + (1.0 - self.gamma) * cosine).float()
        s["alignment"].copy_(torch.where(ok, alignment, s["alignment"]))
        return {"rate": hp.eps + (1.0 + s["alignment"]) / 2.0}, ok


def _aligned(g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """<M, G> and both squares."""
    return g.double() * m, *squares(g, m)


SLOTS = 5
"""Momenta that are kept."""


@dataclass(frozen=True)
class Recalling(Adam):
    """Adam of its momentum and the mean of those that are kept: which one makes room is `given`."""

    moments: ClassVar[Mapping[str, Moment]] = {
        **Adam.moments,
        **{f"critical{i}": Moment() for i in range(SLOTS)},
    }
    given: ClassVar[tuple[str, ...]] = ("share", *(f"slot{i}" for i in range(SLOTS)))

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Both averages, the second of what is stepped by; the momentum takes the place that is free."""
        first = torch.addcmul(m["exp_avg"], g - m["exp_avg"], x.numbers[0])
        seen, second = self._seen(first, m, x), m["exp_avg_sq"]
        kept = {
            f"critical{i}": torch.where(slot > 0.0, first, m[f"critical{i}"])
            for i, slot in enumerate(x.numbers[6:])
        }
        second = torch.addcmul(second, seen * seen - second, x.numbers[1])
        return {"exp_avg": first, "exp_avg_sq": second, **kept}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        return self._seen(m["exp_avg"], old, x) / (m.root("exp_avg_sq") * x.numbers[4] + x.numbers[2])

    @staticmethod
    def _seen(first: Tensor, old: Moments, x: Beside) -> Tensor:
        """The new momentum and the mean of those kept before, corrected."""
        kept = old["critical0"]
        for i in range(1, SLOTS):
            kept = kept + old[f"critical{i}"]
        return (first + kept * x.numbers[5]) * x.numbers[3]


@dataclass(frozen=True)
class CriticalAdam(Measured):
    """Adam that remembers the momenta of its largest gradients (arXiv 2307.09638).

        m <- m + (1 - beta1)(G - m),  c = (m + mean of the kept momenta) / (1 - beta1^t)
        v <- v + (1 - beta2)(c^2 - v),  D = c / (sqrt(v / (1 - beta2^t)) + eps)
        m replaces the kept one of the least priority, if |G| is above that;  priorities <- decay priorities

    Five momenta are kept, each with the norm of its gradient, that of the tensor, as priority. Published code
    takes no step at first, and squares c without its correction: its next steps are up to 10 lr long.
    Bytes for an (m, n) weight in fp32: 28 m n + 24.

    Args:
        decay: of priorities at each step, in (0, 1].

    Example:
        >>> CriticalAdam.of("int8").init(torch.zeros(3, 5))["priority"].tolist()
        [-1.0, -1.0, -1.0, -1.0, -1.0]
    """

    held: Coded = field(default_factory=lambda: coded(Recalling()))
    decay: float = 0.7
    on_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, decay: float = 0.7) -> CriticalAdam:
        """The rule with its moments held as `states` says.

        Raises:
            UserError: a decay outside (0, 1].
        """
        if not 0.0 < decay <= 1.0:
            raise UserError(f"adam_cm: decay lies in (0, 1], got {decay}")
        return cls(coded(Recalling(), states), decay)

    def init(self, x: Tensor) -> State:
        """The moments; -1 is the priority of an empty place."""
        return {**super().init(x), "priority": torch.full((SLOTS,), -1.0, device=x.device)}

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """Which place the new momentum takes, if any; how many there are."""
        (square,) = total(squares, (g,), hp)
        norm, ok, priority = square.sqrt().clamp(max=LARGEST_MOMENT).float(), square.isfinite(), s["priority"]
        places = torch.arange(SLOTS, device=g.device)
        taken = (places == priority.argmin()) & (norm > priority) & ok
        share = (priority >= 0.0).sum().clamp(min=1).reciprocal()
        new = torch.where(taken, norm, priority)
        s["priority"].copy_(torch.where(ok & (new > 0.0), new * self.decay, new))
        slots = taken.float().unbind()
        return {"share": share, **{f"slot{i}": slot for i, slot in enumerate(slots)}}, ok
