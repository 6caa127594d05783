"""Element-wise rules that need a number of the whole tensor first.

    MARS      the norm of the corrected gradient
    FAdam     the rms of the gradient, then of the natural gradient
    Gravity   the largest element of the gradient

A pass over gradient and moments finds what the rule is `given`, in double precision, where
no square of an fp32 number overflows or vanishes; the rest is done element by element
while the step is written. A tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import Rule
from lowmem.optim.elementwise import Beside, Coded, Elementwise, Moment, Moments, coded
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula, together
from lowmem.optim.held import HeldMoment
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.shards import Shape
from lowmem.optim.terms.changes import Change, Rotation
from lowmem.optim.terms.fp32 import LEAST_EPS
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.its import its
from lowmem.optim.terms.state import Constants, State, part

Found = tuple[dict[str, Tensor], Tensor]
"""What the rule is given, 0-D fp32 by name; whether the step is taken, 0-D bool."""


@dataclass(frozen=True)
class Measured(Rule):
    """What these rules are; a subclass says what it finds. Bytes: the moments', and 4 for the age.

    Args:
        held: the element-wise rule, and how its moments are held.

    Attributes:
        turns: whether its moments can follow a rotation.
        on_rows: whether what it finds is of all rows where ranks share them.
    """

    held: Coded
    turns: ClassVar[bool] = False
    on_rows: ClassVar[bool] = False

    uses = its("held")

    def init(self, x: Tensor) -> State:
        """The moments and their age."""
        return self.held.init(x)

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return self.held.constants(shape)

    def shards(self, shape: Shape) -> bool:
        """Where the moments do: what is measured is summed over all rows."""
        return self.on_rows and self.held.shards(shape)

    def check_rebase(self, kind: str) -> None:
        """As for the moments; but all of them have one age."""
        if kind == "permute" or not self.turns:
            super().check_rebase(kind)
        self.held.check_rebase(kind)

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Forget everything, or rotate the moments."""
        if isinstance(change, Rotation):
            self.held.rebase_(s, change, shape, hp)
        else:
            super().rebase_(s, change, shape, hp)

    def moment(self, name: str, g: Blocks, s: State, hp: Hyper) -> HeldMoment:
        """A moment as it is before the step."""
        codec = dict(zip(self.held.rule.moments, self.held.codecs, strict=True))[name]
        return HeldMoment(codec, part(s, name), s, g.shape, hp)

    def numbers(self, s: State, hp: Hyper) -> Tensor:
        """The numbers of the age that this step brings, (k,)."""
        return numbers_of(self.held.rule, s["age"] + 1, hp)

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """Measure."""
        raise NotImplementedError(f"{type(self).__name__} finds nothing")

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Measure; the step is left to the write."""
        given, ok = self.found(g, s, hp)
        held = {key: s[key] for key in sorted(s)}
        return Direction(g, ok=ok, then=(self.held, {**held, **given}))


def total(
    terms: Callable[..., tuple[Tensor, ...]], of: Sequence[Blocks], hp: Hyper, *across: Tensor, count: int = 1
) -> tuple[Tensor, ...]:
    """Sums over the tensor of `count` terms, made of rows of some matrices and of what is across; fp64."""
    x = of[0] if len(of) == 1 else Formula(together, of)
    return hp.total(hp.parts(_Summed(terms), x, across, count=count).sum(0)).unbind()


@dataclass(frozen=True)
class _Summed:
    """The sum of each term."""

    terms: Callable[..., tuple[Tensor, ...]]

    def __call__(self, *given: Tensor) -> Tensor:
        return torch.stack([term.double().sum() for term in self.terms(*given)])


def size(g: Blocks, hp: Hyper) -> int:
    """Elements of the whole tensor."""
    return math.prod(g.shape if hp.shard is None else hp.shard.full)


def square(rows: Tensor) -> Tensor:
    """The term whose sum is the squared norm."""
    return rows.contiguous().double().square()


def squares(*of: Tensor) -> tuple[Tensor, ...]:
    """Those of some matrices."""
    return tuple(square(rows) for rows in of)


@dataclass(frozen=True)
class Corrected(Adam):
    """Adam of c = clip (g + correction (g - g_before)); `clip` is given.

    Args:
        gamma: strength of the correction.
    """

    gamma: float = 0.025
    moments: ClassVar[Mapping[str, Moment]] = {**Adam.moments, "previous": Moment(states="bf16")}
    given: ClassVar[tuple[str, ...]] = ("clip",)

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Adam's, and the factor of the change: 0 at first, where there is no gradient before."""
        beta1 = hp.betas[0]
        return *super().numbers(t, hp), self.gamma * beta1 / (1.0 - beta1) if t > 1 else 0.0

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Adam's averages of what is corrected; the gradient itself for the next step."""
        corrected = (g + x.numbers[5] * (g - m["previous"])) * x.numbers[6]
        return {**super().move(corrected, m, x), "previous": g}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Adam's."""
        return super().direction(g, m, old, Beside(x.numbers[:5], x.lr))

    def rotated(self, m: Mapping[str, Tensor], turn: Rotation, age: Tensor, hp: Hyper) -> dict[str, Tensor]:
        """Adam's; a gradient turns as it is."""
        return {**super().rotated(m, turn, age, hp), "previous": turn(m["previous"])}


@dataclass(frozen=True)
class MARS(Measured):
    """Adam of gradients with less variance (arXiv 2411.10438), its approximate form.

        c = G + gamma beta1 / (1 - beta1) (G - G_before),  c <- c / max(1, |c|);  then Adam of c

    G_before is that of the last batch, and G at first (published code starts from zero, which enlarges the
    first c alone). The norm is that of the tensor. The paper takes betas (0.95, 0.99), and AdamW for all
    that is no matrix. Bytes for an (m, n) weight in fp32: 12 m n + 4.

    Example:
        >>> sorted(MARS.of("fp32").init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq', 'previous']
    """

    held: Coded = field(default_factory=lambda: coded(Corrected()))
    turns: ClassVar[bool] = True
    on_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, gamma: float = 0.025) -> MARS:
        """MARS with its moments held as `states` says.

        Raises:
            UserError: a negative gamma.
        """
        if gamma < 0.0:
            raise UserError(f"mars: gamma is at least 0, got {gamma}")
        return cls(coded(Corrected(gamma), states))

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """The clip factor."""
        correction, before = self.numbers(s, hp)[5], self.moment("previous", g, s, hp)

        (norm,) = total(_corrected, (g, before), hp, correction)
        return {"clip": norm.clamp(min=1.0).rsqrt().float()}, norm.isfinite()


def _corrected(rows: Tensor, before: Tensor, correction: Tensor) -> tuple[Tensor, ...]:
    """The squares of what is corrected."""
    rows = rows.double()
    return ((rows + correction * (rows - before)).square(),)


@dataclass(frozen=True)
class Natural(Elementwise):
    """m <- m + (1 - beta1)(clip g / (sqrt(f) + floor) - m),  d = m; `floor` and `clip` are given."""

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "fisher": Moment(signed=False)}
    given: ClassVar[tuple[str, ...]] = ("floor", "clip")

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1; how far f moves, all the way at first."""
        beta1, beta2 = hp.betas
        return 1.0 - beta1, (1.0 - beta2) / (1.0 - beta2**t)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The second moment without bias, then the average of what it normalises."""
        rate1, rate2, floor, clip = x.numbers
        fisher = torch.addcmul(m["fisher"], g * g - m["fisher"], rate2)
        unit = clip * g / (fisher.sqrt() + floor)
        return {"exp_avg": torch.addcmul(m["exp_avg"], unit - m["exp_avg"], rate1), "fisher": fisher}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The average, without correction: the first steps are short."""
        return m["exp_avg"]


@dataclass(frozen=True)
class FAdam(Measured):
    """Adam as natural gradient descent (arXiv 2405.12807).

        f <- f + r (G^2 - f),  r = (1 - beta2) / (1 - beta2^t)
        u = G / (sqrt(f) + min(eps, 0.01 rms(G))),  u <- u / max(1, rms(u) / clip)
        M <- M + (1 - beta1)(u - M),  D = M

    The decay is decoupled. The paper divides the weight by the same root and clips that too: where an
    element never had a gradient it would take all the decay there is. Published code has max(1, rms(G))
    eps in the root. Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        clip: largest rms of a natural gradient, above 0.

    Example:
        >>> sorted(FAdam.of("int8").init(torch.zeros(3, 5)))
        ['age', 'exp_avg.codes', 'exp_avg.scale', 'fisher.codes', 'fisher.scale']
    """

    held: Coded = field(default_factory=lambda: coded(Natural()))
    clip: float = 1.0
    on_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str, *, clip: float = 1.0) -> FAdam:
        """FAdam with its moments held as `states` says.

        Raises:
            UserError: a clip of 0 or less.
        """
        if not clip > 0.0:
            raise UserError(f"fadam: clip is above 0, got {clip}")
        return cls(coded(Natural(), states), clip)

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """The floor of the root; then the clip factor, which depends on it."""
        count = size(g, hp)
        (norm,) = total(squares, (g,), hp)
        floor = (0.01 * (norm / count).sqrt()).clamp(max=hp.eps).clamp(min=LEAST_EPS).float()
        rate, before = self.numbers(s, hp)[1], self.moment("fisher", g, s, hp)

        (made,) = total(_natural, (g, before), hp, rate, floor)
        clip = self.clip * (made / count).sqrt().clamp(min=self.clip).reciprocal()
        return {"floor": floor, "clip": clip.float()}, norm.isfinite() & made.isfinite()


def _natural(rows: Tensor, old: Tensor, rate: Tensor, floor: Tensor) -> tuple[Tensor, ...]:
    """The squares of a natural gradient."""
    return (square(rows / (torch.addcmul(old, rows * rows - old, rate).sqrt() + floor)),)


@dataclass(frozen=True)
class Damped(Elementwise):
    """V <- V + r (g / (1 + (g top)^2) - V),  d = V; `top` is given."""

    moments: ClassVar[Mapping[str, Moment]] = {"velocity": Moment()}
    given: ClassVar[tuple[str, ...]] = ("top",)
    uses: ClassVar[frozenset[str]] = frozenset({"betas"})

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """How far the average moves."""
        return (1.0 - (hp.betas[0] * t + 1.0) / (t + 2.0),)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average."""
        rate, top = x.numbers
        return {"velocity": m["velocity"] + rate * (g / (1.0 + (g * top).square()) - m["velocity"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The average itself."""
        return m["velocity"]


@dataclass(frozen=True)
class Gravity(Measured):
    """Momentum of gradients whose large elements are pulled back (arXiv 2101.09192).

        V <- b V + (1 - b) G / (1 + (G max|G|)^2),  b = (beta1 t + 1) / (t + 2),  D = V

    V starts at zero: the paper's random start moves every weight by about 0.01, which a pretrained one
    does not bear. Where gradients are far below 1 this is plain momentum.
    Bytes for an (m, n) weight in fp32: 4 m n + 4.

    Example:
        >>> sorted(Gravity.of("fp32").init(torch.zeros(3, 5)))
        ['age', 'velocity']
    """

    held: Coded = field(default_factory=lambda: coded(Damped()))
    on_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, states: str) -> Gravity:
        """Gravity with its average held as `states` says."""
        return cls(coded(Damped(), states))

    def found(self, g: Blocks, s: State, hp: Hyper) -> Found:
        """The largest element."""
        top = hp.peak(g)
        return {"top": top}, top.isfinite()
