"""What a paper writes of an element-wise rule, and the rule that is made of it.

A paper says which moments there are, how they move with a gradient, and which step they give:
an `Elementwise`. How they are held, cut, padded, guarded and compiled is written once, in `Coded`:

    old = decode(held);  new = old where g is not finite, else move(g, old);  held = encode(new)
    d = direction(g, new, old)

    class Lion(Elementwise):
        moments = {"exp_avg": Moment()}
        def numbers(self, t, hp): return hp.betas
        def move(self, g, m, x): return {"exp_avg": g.lerp(m["exp_avg"], x.numbers[1])}
        def direction(self, g, m, old, x): return g.lerp(old["exp_avg"], x.numbers[0]).sign()
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.codecs.blockwise import STATES, Codec, codec
from lowmem.optim.codecs.blockwise import Floats as Uncoded
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine import ages
from lowmem.optim.engine.cutting import LADDER
from lowmem.optim.held import permute_, rotate_, tables, weighted
from lowmem.optim.terms.changes import Change, Permutation, Rotation
from lowmem.optim.terms.hyper import ChunkHyper, Hyper
from lowmem.optim.terms.its import its
from lowmem.optim.terms.state import Constants, State, part, prefixed


@dataclass(frozen=True)
class Moment:
    """What is held of one moment.

    Args:
        signed: whether it has a sign; one without is never negative.
        states: the least precision that the rule works with (a slow average in 8 bits stands still);
            "" for any. A finer one may be asked for.
        each: elements that share a number. Above 1 the moment is held in fp32, and comes as
            (rows, width / each): see `held.pooled` and `held.spread`.
    """

    signed: bool = True
    states: str = ""
    each: int = 1


class Moments:
    """Moments in fp32, by name, as (rows, width)."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self._roots: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def root(self, name: str) -> Tensor:
        """The square root of an unsigned moment, taken once: the step and a codec share it."""
        if name not in self._roots:
            self._roots[name] = self._values[name].sqrt()
        return self._roots[name]

    def known_root(self, name: str) -> Tensor | None:
        """The root if the step has taken it."""
        return self._roots.get(name)


@dataclass(frozen=True)
class Beside:
    """What a rule knows beside gradient and moments.

    Args:
        numbers: what `Elementwise.numbers` gave for this age, then what is `given`; 0-D fp32 each, or
            (rows, width) where columns have ages of their own.
        lr: of this step, 0-D, for moments in units of the weight; a direction may not depend on it.
        weight: the weight in fp32, (rows, width), for a rule that declares `reads_weight`.
    """

    numbers: tuple[Tensor, ...]
    lr: Tensor
    weight: Tensor | None = None


class Elementwise:
    """A rule as a paper writes it; subclasses are frozen dataclasses.

    Attributes:
        moments: what is held, in the order of the state.
        ages: whether the rule knows how many steps its moments have seen (4 bytes for a tensor).
        given: names of 0-D state tensors that the owner of the rule puts there at every step.
        reads_weight: the step depends on the weight, which `Beside` then brings.
        compilable: whether compiling the step pays.
        uses: settings of the parameter group that the rule reads, of betas and eps.
    """

    moments: ClassVar[Mapping[str, Moment]] = {}
    ages: ClassVar[bool] = True
    given: ClassVar[tuple[str, ...]] = ()
    reads_weight: ClassVar[bool] = False
    compilable: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"betas", "eps"})

    @property
    def linear(self) -> bool:
        """Whether the step is in units of the gradient, see `AnyRule.linear`; most are not."""
        return False

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """The numbers of a step, in plain Python.

        Args:
            t: steps that the moments have seen with this one, at least 1; 1 for a rule without age.
            hp: of which betas and eps alone may be read: numbers of an age are kept.
        """
        return ()

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Pure: the moments after a gradient, (rows, width) fp32."""
        return {}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Pure: the step, from the moments as they will be held and as they were."""
        raise NotImplementedError(f"{type(self).__name__} gives no direction")

    def rotated(self, m: Mapping[str, Tensor], turn: Rotation, age: Tensor, hp: Hyper) -> dict[str, Tensor]:
        """The moments after a change of basis; by default C m, which is right for linear averages alone."""
        return {name: turn(m[name]) for name in self.moments}

    def centre(self, hp: Hyper) -> Mapping[str, float]:
        """Factors of moments whose sum B makes W + lr B the weight that the paper evaluates."""
        return {}

    def turns(self) -> bool:
        """Whether `rotated` is right for all moments."""
        return type(self).rotated is not Elementwise.rotated or all(m.signed for m in self.moments.values())


def coded(rule: Elementwise, states: str | Mapping[str, str] = "fp32") -> Coded:
    """The pointwise rule made of an element-wise one; equal ones are one object, and compile once.

    Args:
        rule: what a paper writes.
        states: of every moment, or of each by name (else fp32); not below a moment's own least.

    Raises:
        UserError: an unknown precision or moment, or one that a moment does not work with.

    Example:
        >>> from lowmem.optim.rules.elementwise.adam import Adam
        >>> sorted(coded(Adam(), {"exp_avg": "int8"}).init(torch.zeros(3, 5)))
        ['age', 'exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq']
    """
    if not isinstance(states, str):
        unknown = next((name for name in states if name not in rule.moments), None)
        if unknown is not None:
            raise UserError(
                f"{type(rule).__name__.lower()} has no moment {unknown!r}; {nearest(unknown, rule.moments)}"
            )
    words = (_word(name, moment, states) for name, moment in rule.moments.items())
    return _coded(rule, tuple(words))


def _word(name: str, moment: Moment, states: str | Mapping[str, str]) -> str:
    """The precision of a moment: what is asked for, if that is enough."""
    asked = states if isinstance(states, str) else states.get(name, "fp32")
    if asked not in STATES:
        raise UserError(f"unknown states {asked!r}; {nearest(asked, STATES)}")
    least = "fp32" if moment.each > 1 else moment.states
    if not least or STATES.index(asked) <= STATES.index(least):
        return asked
    if isinstance(states, str):
        return least
    raise UserError(f"{name} needs {least} at least, got {asked!r}; take {name}_states={least}")


@functools.cache
def _coded(rule: Elementwise, words: tuple[str, ...]) -> Coded:
    named = zip(rule.moments.items(), words, strict=True)
    return Coded(rule, tuple(codec(word, signed=m.signed, stream=name) for (name, m), word in named))


@dataclass(frozen=True)
class Coded(Pointwise):
    """An element-wise rule over codecs; made by `coded`.

    Args:
        rule: what a paper writes; codecs: how its moments are held, in their order.
    """

    rule: Elementwise
    codecs: tuple[Codec, ...]

    def _pairs(self) -> Iterator[tuple[str, Moment, Codec]]:
        for (name, moment), held in zip(self.rule.moments.items(), self.codecs, strict=True):
            yield name, moment, held

    uses = its("rule")
    linear = its("rule")

    @property
    def chunk(self) -> int:
        """Fewer elements where there are more than four moments."""
        return LADDER[0] if len(self.codecs) <= 4 else LADDER[1]

    compilable = its("rule")
    reads_weight = its("rule")

    @functools.cached_property
    def grain(self) -> int:
        """Elements that must stay together: a block of every codec, and those that share a number."""
        return math.lcm(*(held.grain * moment.each for _, moment, held in self._pairs()))

    @functools.cached_property
    def spills(self) -> int:
        """What the codecs leave."""
        return sum(held.spills for held in self.codecs)

    @functools.cached_property
    def per(self) -> Mapping[str, int]:
        """What the codecs hold is cut; the age and what is given are not."""
        return {k: n * m.each for name, m, held in self._pairs() for k, n in prefixed(name, held.per).items()}

    @functools.cached_property
    def fill(self) -> Mapping[str, int]:
        """What the codecs pad with."""
        return {k: v for name, _, held in self._pairs() for k, v in prefixed(name, held.fill).items()}

    @functools.cached_property
    def streams(self) -> tuple[str, ...]:
        """Those of the codecs."""
        return tuple(stream for held in self.codecs for stream in held.streams)

    @functools.cached_property
    def readable(self) -> frozenset[str]:
        """All moments that elements do not share."""
        return frozenset(name for name, moment, _ in self._pairs() if moment.each == 1)

    def moment(self, name: str, s: State) -> Tensor:
        """Decoded."""
        held = next(held for own, _, held in self._pairs() if own == name)
        return held.decode(part(s, name), s)

    def init(self, x: Tensor) -> State:
        """Moments of zero, age 0."""
        state: State = {}
        for name, moment, held in self._pairs():
            like = x if moment.each == 1 else x.new_empty(-(-x.numel() // moment.each))
            state |= prefixed(name, held.init(like))
        if self.rule.ages:
            state["age"] = torch.zeros((), dtype=torch.int32, device=x.device)
        return state

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return {key: table for held in self.codecs for key, table in tables(held).items()}

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """The rule's numbers of this age, then what is given; fp32."""
        numbers = ages.numbers_of(self.rule, s.get("age") if self.rule.ages else None, hp)
        if not self.rule.given:
            return numbers
        return torch.cat((numbers, torch.stack([s[name].float() for name in self.rule.given])))

    def table(self, s: State, hp: Hyper) -> Tensor | None:
        """The rule's numbers of every age, where all elements are of one."""
        alone = self.rule.ages and not self.rule.given and not s["age"].dim()
        return ages.table(self.rule, hp, s["age"].device) if alone else None

    def joins(self, s: State) -> bool:
        """Where neither elements nor columns share anything."""
        alone = all(moment.each == 1 for moment in self.rule.moments.values()) and not self.rule.given
        return alone and not ("age" in s and s["age"].dim())

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """Decode, move, guard, step, encode."""
        x = Beside(self._numbers(s, hp), hp.lr, hp.weight)
        old = Moments({name: held.decode(part(s, name), s) for name, _, held in self._pairs()})
        new = self._moved(g, old, x, hp)
        d = self.rule.direction(g, new, old, x)
        del old  # of a chunk's size, each
        return d, self._held(new, s, hp) if hp.keeps else {}

    @staticmethod
    def _numbers(s: State, hp: ChunkHyper) -> tuple[Tensor, ...]:
        """The numbers as 0-D tensors; where columns have ages, for each element those of its column."""
        if hp.scalars.dim() != 2:  # (k,), or (k, rows, 1) where rows are of several tensors
            return hp.scalars.unbind()
        column = (hp.position // s["stride"]) % hp.scalars.shape[1]
        return tuple(numbers[column] for numbers in hp.scalars.unbind())

    def _moved(self, g: Tensor, old: Moments, x: Beside, hp: ChunkHyper) -> Moments:
        """The moments as they will be held: none is infinite, and none moves by what is not finite."""
        moved = self.rule.move(g, old, x)
        for name, moment, _ in self._pairs():
            # what blocks share counts an element that is not finite as zero
            moved[name] = (hp.keep if moment.each == 1 else hp.keep_whole)(moved[name], old[name])
        return Moments(moved)

    def _held(self, new: Moments, s: State, hp: ChunkHyper) -> State:
        coded = ((n, held.encode(new[n], hp, s, new.known_root(n))) for n, _, held in self._pairs())
        return {key: value for name, held in coded for key, value in prefixed(name, held).items()}

    def beside(self, s: State, shape: tuple[int, int], hp: Hyper) -> Blocks | None:
        """What the rule says."""
        codecs = {name: held for name, _, held in self._pairs()}
        return weighted(s, {name: (codecs[name], f) for name, f in self.rule.centre(hp).items()}, shape, hp)

    def check_rebase(self, kind: str) -> None:
        """Rotating needs whole moments, and a rule that says how those without a sign turn."""
        name = type(self.rule).__name__.lower()
        shared = any(moment.each > 1 for moment in self.rule.moments.values())
        if kind in ("permute", "rotate") and shared:
            raise UserError(f"moments of {name} that elements share cannot rotate; take 'keep' or 'reset'")
        if kind != "rotate" or not self.rule.moments:
            return
        if any(held != Uncoded(stream=name) for name, _, held in self._pairs()):
            raise UserError("on_refresh='rotate' needs states='fp32'; take states='fp32' or 'keep'")
        if not self.rule.turns():
            raise UserError(
                f"on_refresh='rotate' is not defined for the moments of {name}; take 'keep' or 'reset'"
            )

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Forget, permute or rotate."""
        if isinstance(change, Rotation):
            rotate_(s, self.rule.moments, self.rule.rotated, change, shape, hp)
        elif isinstance(change, Permutation):
            permute_(s, {name: held for name, _, held in self._pairs()}, change, shape, hp)
        else:
            super().rebase_(s, change, shape, hp)
