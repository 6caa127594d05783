"""Every strategy, every choice of every option, and the compositions that must hold together.

Nothing here names a strategy: what is registered is enrolled, small, by the meaning of its options.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lowmem
from lowmem.errors import UserError
from tests.enrolled import on_any_model

GAP = 4
ALL_PAIRS = (("states", "on_refresh"),)
EACH_ONCE = (("states", "writer"), ("states", "projector"), ("on_refresh", "projector"), ("split", "states"))
"""Options whose choices are combined wherever a strategy has both: every pair, or each choice in one pair."""


@dataclass(frozen=True)
class Case:
    """One strategy with options, small enough for the zoo."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    varied: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.options if key in self.varied)
        return f"{self.name}[{told}]" if told else self.name

    def create(self) -> Any:
        return lowmem.create(self.name, **dict(self.options))

    def optimizer(self, model: Any, **hyper: Any) -> Any:
        defaults: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
        read = {number for rule in self.create().rules.values() for number in rule.uses}
        kept = {key: value for key, value in defaults.items() if key not in ("betas", "eps") or key in read}
        return lowmem.optimizer(model, self.name, **{**kept, **hyper}, **dict(self.options))

    @property
    def by_backward(self) -> bool:
        """Whether `p.grad` is what the strategy steps by."""
        return bool(self.create().source.needs_autograd)


def small(option: Any) -> Any:
    """A default turned down to the zoo's size."""
    if option.type is int and "gap" in option.name:
        return GAP
    if option.type is int and option.name == "rank":
        return 3
    return option.default


def alternatives(option: Any) -> list[Any]:
    """The other values an option may take: each choice, or the other truth value."""
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    if option.type is bool:
        return [not option.default]
    return []


def case(name: str, entry: Any, changes: dict[str, Any]) -> Case:
    values = {key: small(option) for key, option in entry.options.items()}
    values.update(changes)
    return Case(name, tuple(values.items()), tuple(changes))


def plain() -> list[Case]:
    """Every strategy as it comes."""
    return [case(name, entry, {}) for name, entry in on_any_model().items()]


def single() -> list[Case]:
    """Every strategy with one option changed."""
    return [
        case(name, entry, {key: value})
        for name, entry in on_any_model().items()
        for key, option in entry.options.items()
        for value in alternatives(option)
    ]


def paired() -> Iterator[Case]:
    """Two options changed together, where that is defined."""
    for name, entry in on_any_model().items():
        for first, second in (*ALL_PAIRS, *EACH_ONCE):
            if first not in entry.options or second not in entry.options:
                continue
            ones, others = alternatives(entry.options[first]), alternatives(entry.options[second])
            pairs = list(itertools.product(ones, others))
            if (first, second) in EACH_ONCE and pairs:
                count = max(len(ones), len(others))
                pairs = [(ones[i % len(ones)], others[i % len(others)]) for i in range(count)]
            for one, other in pairs:
                yield case(name, entry, {first: one, second: other})


def refused() -> list[tuple[Case, UserError]]:
    """Compositions that say no, and what they say."""
    said = []
    for composition in [*single(), *paired()]:
        try:
            composition.create()
        except UserError as error:
            said.append((composition, error))
    return said


def every() -> list[Case]:
    """All of the above that are defined."""
    undefined = {str(composition) for composition, _ in refused()}
    return [c for c in (*plain(), *single(), *paired()) if str(c) not in undefined]


def choose(width: str) -> list[Case]:
    """As wide as a test needs: plain, each option changed alone, or composed as well."""
    return {"plain": plain, "single": lambda: [*plain(), *single()], "composed": every}[width]()
