"""Rules around a rule that is written element by element: they hold one moment more, of its steps.

Papers hold a second copy of the weights and swap. What such a copy is apart from the
weights is a sum of steps, so that is what is held here, in units of lr: it bears coding,
works in a subspace, and reads no weight. A step counts with the lr of the step that
looks back on it; decay is decoupled as everywhere, and no part of it. Other modifiers
stand outside: they change the steps that are taken, not those that are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.changes import Rotation
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.its import its


@dataclass(frozen=True)
class Around(Elementwise):
    """What both are; a subclass says what it holds, and what becomes of a step.

    Args:
        rule: what makes the steps; one that is given nothing from outside.
    """

    rule: Elementwise
    own: ClassVar[Mapping[str, Moment]] = {}

    # attributes of a class elsewhere, here those of a rule
    @property
    def moments(self) -> Mapping[str, Moment]:  # type: ignore[override]
        """Those of the rule, and one more."""
        return {**self.rule.moments, **self.own}

    reads_weight = its("rule")
    compilable = its("rule")
    uses = its("rule")
    linear = its("rule")

    def count(self, t: int) -> float:
        """The number of this age that the rule around needs."""
        return 0.0

    def held(self, d: Tensor, old: Moments, number: Tensor) -> dict[str, Tensor]:
        """What is held after a step d."""
        raise NotImplementedError(f"{type(self).__name__} holds nothing")

    def taken(self, d: Tensor, old: Moments, number: Tensor) -> Tensor:
        """The step that is taken instead of d."""
        raise NotImplementedError(f"{type(self).__name__} takes no step")

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Those of the rule, and one more."""
        return *self.rule.numbers(t, hp), self.count(t)

    def _inside(self, x: Beside) -> Beside:
        return Beside(x.numbers[:-1], x.lr, x.weight)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The moments of the rule, and its step with what was held of those before."""
        moved = self.rule.move(g, m, self._inside(x))
        d = self.rule.direction(g, Moments(moved), m, self._inside(x))
        return {**moved, **self.held(d, m, x.numbers[-1])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Another step than the rule's."""
        return self.taken(self.rule.direction(g, m, old, self._inside(x)), old, x.numbers[-1])

    def rotated(self, m: Mapping[str, Tensor], turn: Rotation, age: Tensor, hp: Hyper) -> dict[str, Tensor]:
        """The rule's; steps turn as they are."""
        return {**self.rule.rotated(m, turn, age, hp), **{name: turn(m[name]) for name in self.own}}

    def centre(self, hp: Hyper) -> Mapping[str, float]:
        """The rule's, seen from where the paper has its weight."""
        return {**self.rule.centre(hp), **dict.fromkeys(self.own, self.away())}

    def away(self) -> float:
        """The factor of what is held, from the weight to the paper's."""
        return 1.0

    def turns(self) -> bool:
        """Where the rule does."""
        return self.rule.turns()


@dataclass(frozen=True)
class Lookahead(Around):
    """Every k-th step goes back part of the way to where the weight was k steps ago (arXiv 1907.08610).

        q <- q + d;  at every k-th step instead  d <- share d - (1 - share) q,  q <- 0

    q is the sum of steps since: W + lr q is the paper's slow weight, so that W - lr d lands between the two.
    Published code loses the slow weight when it resumes. Bytes beside the rule's, for an (m, n) weight in
    fp32: 4 m n, and 4 where the rule has no age.

    Args:
        every: k, at least 1; share: of the way that is kept, in (0, 1].

    Raises:
        UserError: a number outside its range.

    Example:
        >>> from lowmem.optim.rules.elementwise.sgd import SGD
        >>> sorted(Lookahead(SGD(), every=10).moments)
        ['since']
    """

    every: int = 5
    share: float = 0.5
    own: ClassVar[Mapping[str, Moment]] = {"since": Moment()}

    def __post_init__(self) -> None:
        if self.every < 1 or not 0.0 < self.share <= 1.0:
            raise UserError(f"lookahead: every >= 1 and share in (0, 1], got {self.every} and {self.share}")

    def count(self, t: int) -> float:
        """Whether this step looks back."""
        return float(t % self.every == 0)

    def held(self, d: Tensor, old: Moments, number: Tensor) -> dict[str, Tensor]:
        """The way since the last look back."""
        return {"since": torch.where(number > 0.0, 0.0, old["since"] + d)}

    def taken(self, d: Tensor, old: Moments, number: Tensor) -> Tensor:
        """The rule's step, or back."""
        back = self.share * d - (1.0 - self.share) * old["since"]
        return torch.where(number > 0.0, back, d)


@dataclass(frozen=True)
class XGrad(Around):
    """Gradients are taken where the weight will be some steps ahead (arXiv 2305.18240).

        d_t <- (1 + ahead) d_t - ahead d_(t-1)

    The paper displaces the weight by ahead lr d for each forward pass and puts it back. Here W is the
    displaced one all the time: each step takes the last displacement back and the next one on.
    W + ahead lr d is the paper's weight. Bytes beside the rule's, for an (m, n) weight in fp32: 4 m n,
    as a copy of the weight would take.

    Args:
        ahead: steps, at least 1.

    Raises:
        UserError: fewer.

    Example:
        >>> from lowmem.optim.rules.elementwise.adam import Adam
        >>> sorted(XGrad(Adam()).moments)
        ['exp_avg', 'exp_avg_sq', 'previous_step']
    """

    ahead: int = 1
    own: ClassVar[Mapping[str, Moment]] = {"previous_step": Moment(states="bf16")}

    def __post_init__(self) -> None:
        if self.ahead < 1:
            raise UserError(f"xgrad: ahead is at least 1, got {self.ahead}")

    def held(self, d: Tensor, old: Moments, number: Tensor) -> dict[str, Tensor]:
        """The step that the weight is ahead by."""
        return {"previous_step": d}

    def taken(self, d: Tensor, old: Moments, number: Tensor) -> Tensor:
        """Back, and further on."""
        return d + self.ahead * (d - old["previous_step"])

    def away(self) -> float:
        """Back from where the gradient is taken."""
        return float(self.ahead)
