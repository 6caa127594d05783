"""Modifiers one after the other, seen as one: what they hold, their sums, the product of their factors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.contract import AnyRule, is_pointwise
from lowmem.optim.modifiers.modifier import NONE, Modifier
from lowmem.optim.terms.fp32 import LARGEST_MOMENT
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State, prefixed, scoped

SUMS = "modified.sums"
"""Where the sums over a tensor add up; 0 between steps."""


def _word(modifier: Modifier) -> str:
    """spike_clip of SpikeClip."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(modifier).__name__).lower()


@dataclass(frozen=True)
class Chain:
    """Modifiers in the order in which they take a step, the one nearest to the rule first.

    Args:
        pacing: where factors are held that need no sums, if no other does: they are known before the step.

    Raises:
        UserError: a modifier twice.
    """

    modifiers: tuple[Modifier, ...]
    pacing: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        words = [_word(modifier) for modifier in self.modifiers]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise UserError(f"modifier {' and '.join(twice)} is given twice; once is enough")
        paces = [modifier.paces and not self.count for modifier in self.modifiers]
        keys = [f"modified.{word}.pace" for word, own in zip(words, paces, strict=True) if own]
        object.__setattr__(self, "pacing", tuple(keys))

    @property
    def needs(self) -> tuple[str, ...]:
        """Moments that any of them reads."""
        return tuple(dict.fromkeys(name for modifier in self.modifiers for name in modifier.needs))

    @property
    def reads_weight(self) -> bool:
        """Whether any of them does."""
        return any(modifier.reads_weight for modifier in self.modifiers)

    @property
    def reads_gradient(self) -> bool:
        """Whether any of them does."""
        return any(modifier.reads_gradient for modifier in self.modifiers)

    @functools.cached_property
    def count(self) -> int:
        """Sums over the tensor."""
        return sum(len(modifier.sums) for modifier in self.modifiers)

    @functools.cached_property
    def resets(self) -> bool:
        """Whether any of them lets the rule forget its moments."""
        return any(modifier.resets for modifier in self.modifiers)

    def problems(self, rule: AnyRule) -> Iterator[str]:
        """What a rule cannot serve, with the remedy."""
        if rule.idle:
            yield "a rule that takes no step has none to modify; leave its modifiers out"
        if self.resets:
            yield from _unforgettable(rule)
        readable = rule.readable if is_pointwise(rule) else frozenset()
        for modifier in self.modifiers:
            lacking = [name for name in modifier.needs if name not in readable]
            if lacking:
                names = " and ".join(lacking)
                yield (
                    f"{_word(modifier)} reads {names}, a number for each element, which the rule it modifies "
                    "does not hold; take rule=adam, or leave it out"
                )

    def init(self, x: Tensor) -> State:
        """What the modifiers hold, and their sums."""
        state: State = {}
        for modifier in self.modifiers:
            state |= prefixed(f"modified.{_word(modifier)}", modifier.init(x))
        if self.count:
            state[SUMS] = torch.zeros(self.count, dtype=torch.float64, device=x.device)
        return state

    def begin_(self, s: State, hp: Hyper) -> bool:
        """Before a step: whether the rule is to forget its moments."""
        asked = [m.begin_(scoped(s, f"modified.{_word(m)}"), hp) for m in self.modifiers]
        return any(asked)

    def before(self, g: Tensor, moments: Mapping[str, Tensor], age: Tensor) -> Tensor:
        """The gradient that the rule sees; the one nearest to it has the last word."""
        for modifier in reversed(self.modifiers):
            g = modifier.before(g, moments, age)
        return g

    def shaped(self, g: Tensor, d: Tensor, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """The step, up to the factor."""
        for modifier in self.modifiers:
            d = modifier.shape(g, d, moments)
        return d

    def sums(self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """All sums over (rows, width) elements, (count,) fp64."""
        found: list[Tensor] = []
        for modifier in self.modifiers:
            found += [x.sum(-1, dtype=torch.float64).sum() for x in modifier.measure(g, d, w, moments)]
            d = modifier.shape(g, d, moments)
        return torch.stack(found)

    def pace(self, s: State) -> Tensor:
        """The factor that is known before the step, 0-D fp32."""
        return functools.reduce(torch.mul, [s[key] for key in self.pacing])

    def factor_(self, sums: Tensor, s: State, ok: Tensor, scale: float = 1.0) -> Tensor:
        """The product of all factors, 0-D fp32, finite; what is held moves on where the step is taken.

        Args:
            sums: (count,), over the whole tensor; s: the state of the rule; ok: 0-D bool.
            scale: what else the step is multiplied by.
        """
        product, first = torch.ones((), dtype=torch.float64, device=sums.device), 0
        for modifier in self.modifiers:
            powers = modifier.sums
            own = [x * (product * scale) ** k for x, k in zip(sums[first:], powers, strict=False)]
            first += len(powers)
            held = scoped(s, f"modified.{_word(modifier)}")
            factor, new = modifier.factor(own, held)
            for key, value in new.items():
                held[key].copy_(torch.where(ok, value.to(held[key].dtype), held[key]))
            product = product * factor
        return product.clamp(max=LARGEST_MOMENT).float()


def _unforgettable(rule: AnyRule) -> Iterator[str]:
    """Why the moments of a rule cannot be forgotten."""
    if not rule.init(torch.empty(1, 1, device="meta")):
        yield "momentum_reset: the rule that it modifies holds nothing to forget; leave it out"
        return
    try:
        rule.check_rebase("reset")
    except UserError:
        yield "momentum_reset cannot stand around a subspace, whose basis would go too; put it inside"
