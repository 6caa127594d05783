"""What the contract suite runs over: every part once, every method as it comes and with each option changed.

Nothing here names a method, and parts only where a part of another kind must stand beside one that needs it:
what is registered is enrolled, small, by the limits of its options.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lowmem
from lowmem.errors import UserError
from lowmem.strategies import parts
from lowmem.strategies.method import AXES, ROLES, methods
from lowmem.strategies.parts import KINDS
from lowmem.strategies.registry import beside
from lowmem.training.contract.check import small
from tests.enrolled import of_kind, on_any_model, unlike

GAP = 4
CARRIER = "adamw"
"""The plainest method: parts are hung into it."""
BESIDE: dict[str, dict[str, Any]] = {
    "residual": {"projector": "power"},
    "schedule": {"residual": "sign"},
    "source": {"rule": "sgd"},
}
"""What stands beside a part of a kind that means nothing alone."""
BESIDE_ONE: dict[tuple[str, str], dict[str, Any]] = {
    ("residual", "subset_norm"): {"projector": "power", "rule": "average"},
}
"""What stands beside a part that does not go with Adam."""
AXIS = {"modifier": "modifiers"}
"""The axis of a kind that is not called like it."""
AXIS_OF = {axis: kind for kind, axis in AXIS.items()}
DRAWS = 150


@dataclass(frozen=True)
class Case:
    """One composition, small enough for the zoo.

    Args:
        name: of the method; options: all that is given.
        varied: those that make it another case than the method as it comes.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    varied: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.options if key in self.varied)
        return f"{self.name}[{told}]" if told else self.name

    def create(self) -> lowmem.Strategy:
        return _created(self)

    def optimizer(self, model: Any, **hyper: Any) -> Any:
        defaults: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
        kept = {k: value for k, value in defaults.items() if k not in ("betas", "eps") or self.reads(k)}
        return lowmem.optimizer(model, self.create(), **{**kept, **hyper})

    def reads(self, number: str) -> bool:
        """Whether a rule reads betas or eps: it is refused otherwise."""
        return any(number in rule.uses for rule in self.create().rules.values())

    @property
    def by_backward(self) -> bool:
        """Whether `p.grad`, and nothing beside it, is what the strategy steps by."""
        return bool(self.create().source.needs_autograd) and not self.create().asks


@functools.cache
def _created(case: Case) -> lowmem.Strategy:
    return lowmem.create(case.name, **dict(case.options))


def case(name: str, **changes: Any) -> Case:
    """A method with some options changed; the sizes and gaps of the others are turned down."""
    return Case(name, tuple(small(name, changes).items()), tuple(changes))


def part_case(kind: str, name: str, **changes: Any) -> Case:
    """A part in the plainest method."""
    return case(CARRIER, **neighbours(kind, name), **changes)


def neighbours(kind: str, name: str) -> dict[str, Any]:
    """A part on its axis, and what must stand beside it."""
    return {**BESIDE_ONE.get((kind, name), BESIDE.get(kind, {})), AXIS.get(kind, kind): name}


def chosen() -> list[tuple[str, str]]:
    """Every part that is a choice: those that leave an ordinary optimizer are in every method."""
    return [(kind, name) for kind in KINDS for name in of_kind(kind) if name not in AXES.values()]


def plain() -> list[Case]:
    """Every method as it comes."""
    return [case(name) for name in on_any_model()]


def each() -> list[Case]:
    """Every method as it comes, and every part that none of them has, in the plainest method."""
    words = [{a: o.default for a, o in entry.axes.items()} for entry in on_any_model().values()]
    has = {
        (AXIS_OF.get(a, a), name) for told in words for a, text in told.items() for name in text.split("+")
    }
    return [*plain(), *(part_case(kind, name) for kind, name in chosen() if (kind, name) not in has)]


def kinds() -> list[Case]:
    """A method of each make, and the parts that no method has."""
    names = unlike()
    return [one for one in each() if one.varied or one.name in names]


def others(option: Any) -> list[Any]:
    """Other values that an option may take: each word, the other truth value, a number nearby."""
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    if option.type is bool:
        return [not option.default]
    if option.limits.size:
        return [0.5]
    return []


def changed() -> list[Case]:
    """Every option changed to each other word: those of a part in the plainest method, those of the frame
    beside every rule and projector, and in every method those that its record sets.
    """
    found = []
    for kind, name in chosen():
        table = beside(CARRIER, **neighbours(kind, name))
        prefix = name if kind == "modifier" else kind
        own = [key if key in table else f"{prefix}_{key}" for key in parts(kind)[name].options]
        own += {"rule": ["states"], "projector": ["on_refresh"]}.get(kind, [])
        for key in (key for key in own if key in table):
            found += [part_case(kind, name, **{key: value}) for value in others(table[key])]
    for name, entry in on_any_model().items():
        sets = [key for key in methods()[name].defaults if key in entry.options and key not in entry.axes]
        found += [case(name, **{key: v}) for key in sets for v in others(entry.options[key])]
    return found


def defined(found: list[Case]) -> Iterator[Case]:
    """Those that can be made."""
    for one in found:
        try:
            one.create()
        except UserError:
            continue
        yield one


def refused(found: list[Case]) -> list[tuple[Case, UserError]]:
    """Those that say no, and what they say."""
    said = []
    for one in found:
        try:
            one.create()
        except UserError as error:
            said.append((one, error))
    return said


@functools.cache
def choose(width: str) -> list[Case]:
    """As wide as a test needs: methods as they come, with every part, or with every option too."""
    wide = {"plain": plain, "kinds": kinds, "each": each, "changed": lambda: [*each(), *defined(changed())]}
    return list(dict.fromkeys(wide[width]()))


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Compositions by lot, each defined; every part has its turn."""
    found: dict[Any, Case] = {}
    lot = 0
    while len(found) < DRAWS:
        one = draw(lot)
        lot += 1
        try:
            found.setdefault(one.create(), one)
        except UserError:
            continue
    alone = [part_case(kind, name) for kind, name in chosen() if not _has(found.values(), kind, name)]
    return (*found.values(), *alone)


def _has(found: Iterable[Case], kind: str, name: str) -> bool:
    """Whether a part is in one of them; few compositions take a rule that reads the weight."""
    key = AXIS.get(kind, kind)
    return any(name in str(dict(one.options).get(key, "")).split("+") for one in found)


def draw(lot: int) -> Case:
    """One composition, defined or not."""
    rng = random.Random(lot)
    words: dict[str, Any] = {"projector": _turn("projector", lot, rng), "rule": _turn("rule", lot, rng)}
    words["writer"] = _turn("writer", lot, rng)
    words["residual"] = _turn("residual", lot, rng)
    if rng.random() < 0.15:
        words["projector"] = "none"
    if rng.random() < 0.25:
        words["schedule"] = _turn("schedule", lot, rng)
    if rng.random() < 0.1:
        words["source"] = _turn("source", lot, rng)
    if words["projector"] == "none" and words.get("schedule", "always") == "always":
        del words["residual"]
    taken = rng.sample(sorted(parts("modifier")), min(rng.randint(0, 2), len(parts("modifier"))))
    words |= {"modifiers": "+".join(taken)} if taken else {}
    words |= {role: rng.choice(sorted(parts("rule"))) for role in ROLES if rng.random() < 0.2}
    options = beside(CARRIER, **words)
    values = {
        key: rng.choice(others(option))
        for key, option in options.items()
        if key not in AXES and rng.random() < 0.4 and others(option)
    }
    return case(CARRIER, **words, **values)


def _turn(kind: str, lot: int, rng: random.Random) -> str:
    """Every part of a kind in turn, in another order in every round."""
    names = of_kind(kind)
    turn, place = divmod(lot, len(names))
    random.Random(f"{kind}{turn}").shuffle(names)
    return names[place]
