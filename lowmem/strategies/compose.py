"""From a method and the user's options to a strategy, or to all that is wrong with them.

    words -> which options there are -> their values -> parts -> rules by role -> Strategy

The value of an option is the user's, else the method's, else the part's. A method's
default follows its axis: another part that has an option of the same name takes it over,
one that has not lets it drop. What is told as options of the finished strategy is
complete, so that `create` makes the same strategy of it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lowmem.errors import UserError
from lowmem.optim.codecs.blockwise import STATES, codec
from lowmem.optim.contract import AnyRule, is_pointwise
from lowmem.optim.elementwise import Elementwise, coded
from lowmem.optim.modifiers.modified import modified
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.strategy import Plain, Strategy
from lowmem.optim.subspace import Subspace
from lowmem.strategies.effect import never_renewed, restarted, without_effect
from lowmem.strategies.method import AXES, NONE, ROLES, Method
from lowmem.strategies.options import Option
from lowmem.strategies.words import (
    FRAME,
    Known,
    Slot,
    Words,
    chosen,
    holds_moments,
    known,
    modifiers,
    moments_of,
    stranger,
)

T = TypeVar("T")
At = tuple[str, str]
"""A slot's name and an option's; the frame is the slot ""."""
States = str | Mapping[str, str]
HOLDERS = ("rule", "modifier")
"""Kinds that may hold moments."""


@dataclass
class Composition:
    """One reading of a method's options.

    Args:
        method: what they belong to.
        problems: all that is wrong, one sentence each.
        given: the user's options, typed.
        values: the user's and the method's, by slot.
    """

    method: Method
    problems: list[str] = field(default_factory=list)
    given: dict[str, Plain] = field(default_factory=dict)
    values: dict[At, Plain] = field(default_factory=dict)
    words: Words = field(init=False)
    known: Known = field(init=False)

    def read(self, options: Mapping[str, Any], *, text: bool) -> None:
        """Take the user's options; as text, they are turned into numbers first."""
        self.words = chosen(self.method, options, self.problems)
        self.known = known(self.words)
        self.values = {at: value for at, value in fixed(self.method).items() if self._exists(at)}
        seen: dict[At, str] = {}
        for key, value in options.items():
            if key in AXES or key in ROLES:
                self.given[key] = value
                continue
            if key not in self.known.table:
                self.problems.append(stranger(str(key), self.words))
                continue
            slot, option = self.known.table[key]
            at = place(slot, option)
            if at in seen:
                self.problems.append(f"{seen[at]} and {key} are the same; give one of them")
            seen[at] = key
            checked = self.attempt(lambda o=option, v=value: _value(o, v, text))  # type: ignore[misc]
            if checked is not None:
                self.given[key] = self.values[at] = checked

    def _exists(self, at: At) -> bool:
        name, option = at
        if not name:
            return option in self.known.table
        return any(slot.name == name and option in slot.part.options for slot in self.known.slots)

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What is made, or None and one problem more."""
        try:
            return make()
        except UserError as error:
            self.problems.append(str(error))
            return None

    def slot(self, name: str) -> Slot | None:
        """The part that sits on an axis, at a modifier's or a role's place."""
        return next((slot for slot in self.known.slots if slot.name == name), None)

    def frame(self, name: str) -> Any:
        """The value of one of the frame's options; "" where it was not given and has no default."""
        return self.values.get(("", name), self.known.table[name][1].default)

    def values_of(self, slot: Slot) -> dict[str, Plain]:
        """The options of a slot's part; a role that shares a rule has its, where it is not told others."""
        usual = [self.slot(name) for name in ("other", "rule")] if slot.name in ROLES else []
        names = [slot.name, *(one.name for one in usual if one is not None and one.part == slot.part)]

        def value(option: Option) -> Plain:
            told = (self.values[name, option.name] for name in names if (name, option.name) in self.values)
            return next(told, option.default)

        return {key: value(option) for key, option in slot.part.options.items()}

    def make(self, name: str, **told: Any) -> Any:
        """The part on an axis or at a role, or None and one problem more."""
        slot = self.slot(name)
        return None if slot is None else self.attempt(lambda: slot.part.make(self.values_of(slot), **told))

    def build(self) -> Strategy | None:
        """The strategy, where nothing is wrong."""
        self.problems += without_effect(self)
        rules = self._rules()
        source, writer = self.make("source"), self.make("writer")
        schedule = self.make("schedule")
        if schedule is not None and schedule.rests and rules and rules.get("inactive", rules["matrix"]).idle:
            self.problems.append("no matrix would ever take a step; take residual=sign, or activate some")
        if source is not None and source.holds and self.words["schedule"] != "always":
            self.problems.append(
                f"source={self.words['source']} holds something for every tensor, which "
                f"schedule={self.words['schedule']} would let go; take schedule=always"
            )
        probed = any(rule.probes for rule in (rules or {}).values())
        if probed and source is not None and not source.needs_autograd:
            self.problems.append(
                f"source={self.words['source']} makes no gradients, and a probe of the curvature is one; "
                f"take source=backprop"
            )
        if self.problems or rules is None:
            return None
        made = Strategy(rules=rules, source=source, writer=writer, schedule=schedule)
        return made.called(self.method.name, self.options())

    def _states(self, role: str = "") -> States:
        """Precision of the moments of a role's rule."""
        own = (self.frame(f"{role}_states") or self.frame("other_states")) if role else ""
        word, slot, base = str(own or self.frame("states")), self.slot(role or "rule"), self.slot("rule")
        moments = moments_of(base.part) if base and slot and slot.part == base.part and not own else {}
        told = {name: self.frame(f"{name}_states") for name in moments}
        if not any(told.values()):
            return word
        least = {name: "fp32" if m.each > 1 else m.states or word for name, m in moments.items()}
        return {name: one or min(word, least[name], key=STATES.index) for name, one in told.items()}

    def _rule(self, name: str, states: States, *, inside: bool = False) -> AnyRule | None:
        """The rule at a slot, inside the modifiers of its role."""
        made = self.make(name, states=states, inside=inside)
        own = self.frame(f"{name}_modifiers") if name in ROLES else ""
        words = modifiers("modifiers", own or self.method.word("modifiers", self.given), [])
        asked = {word: modifier for word in words if (modifier := self.make(word)) is not None}
        self.problems += restarted(made, asked, self.frame("on_refresh") if inside else "")
        for word, modifier in asked.items():
            if made is not None and not isinstance(modifier, Modifier):
                made = self.attempt(functools.partial(_around, modifier, made, word))
        if isinstance(made, Elementwise):
            made = self.attempt(functools.partial(coded, made, states))
        rule: AnyRule | None = made
        for modifier in asked.values():
            if rule is not None and isinstance(modifier, Modifier):
                rule = self.attempt(functools.partial(modified, rule, [modifier]))
        return rule

    def _rules(self) -> dict[str, AnyRule] | None:
        residual, plain = self.make("residual"), self._rule("rule", self._states())
        usual = ("other", self._states("other")) if self._own("other") else ("rule", self._states())
        other, small = self._rule(*usual), self._rule(usual[0], _unblocked(usual[1]))
        if plain is None or other is None or small is None:
            return None
        matrix = plain if self.words["projector"] == NONE else self._subspace(residual)
        if isinstance(matrix, Subspace) and matrix.projector.partial and not self._own("other"):
            other = small = matrix
        rules = {"matrix": matrix or plain, "other": other}
        if is_pointwise(other) and small != other and (other == plain or not is_pointwise(rules["matrix"])):
            rules["small"] = small
        if self.words["schedule"] != "always" and residual is not None:
            rules |= self._aside(residual)
        for role in ROLES[1:]:
            if self._own(role) and (rule := self._rule(role, self._states(role))):
                rules[role] = rule
        return rules

    def _aside(self, residual: Any) -> dict[str, AnyRule]:
        """The rule of what the schedule puts aside."""
        rule = residual.aside()
        if rule is None:
            self.problems.append(
                f"residual={self.words['residual']} cannot step what schedule={self.words['schedule']} puts "
                f"aside; take residual=drop, sign or sgd"
            )
        return {} if rule is None else {"inactive": rule}

    def _subspace(self, residual: Any) -> Subspace | None:
        projector, rule = self.make("projector"), self._rule("rule", self._states(), inside=True)
        if projector is None or rule is None or residual is None:
            return None
        self.problems += never_renewed(self, projector)
        if not residual.lifts:
            if self.given.get("scale", 1.0) != 1.0:
                self.problems.append(
                    f"residual={self.words['residual']} lifts nothing that scale is of; take residual_scale"
                )
            self.values["", "scale"] = 1.0
        refresh, scale = self.frame("on_refresh"), self.frame("scale")
        return self.attempt(lambda: Subspace(projector, rule, residual, refresh, scale))

    def _own(self, role: str) -> bool:
        """Whether a role has a rule of its own: another part, precision, option or modifiers."""
        told = self.words[role] or self.frame(f"{role}_states") or self.frame(f"{role}_modifiers")
        return bool(told) or any(name == role for name, _ in self.values)

    def options(self) -> dict[str, Plain]:
        """Everything that is in effect and not neutral, as `create` takes it."""
        words = {axis: self.words[axis] for axis, _ in self.words.axes}
        words["modifiers"] = str(self.method.word("modifiers", self.given))
        told: dict[str, Plain] = {
            axis: words[axis]
            for axis, neutral in AXES.items()
            if words[axis] != neutral or self.method.word(axis, {}) != neutral
        }
        told |= {role: word for role, word in self.words.roles if word}
        for slot in self.known.slots:
            if slot.name not in ROLES:
                told |= {self.known.short[slot.name, k]: v for k, v in self.values_of(slot).items()}
        if any(holds_moments(slot.part) for slot in self.known.slots if slot.part.kind in HOLDERS):
            told["states"] = self.frame("states")
        told |= {name: self.frame(name) for name in ("on_refresh", "scale") if name in self.known.table}
        told |= {
            (option if not name else f"{name}_{option}"): value
            for (name, option), value in self.values.items()
            if name in ROLES or (not name and option not in FRAME)
        }
        return told


def compose(
    method: Method, options: Mapping[str, Any], *, text: bool = False
) -> tuple[Composition, Strategy]:
    """Read options and make the strategy.

    Args:
        method: what they belong to.
        options: values, or with `text` what stands on a command line.

    Raises:
        UserError: all that is wrong with them, in one line.
    """
    found = Composition(method)
    found.read(options, text=text)
    strategy = found.build()
    if found.problems or strategy is None:
        raise UserError(f"{method.name}: {'; '.join(dict.fromkeys(found.problems))}")
    return found, strategy


@functools.lru_cache(maxsize=256)
def fixed(method: Method) -> Mapping[At, Plain]:
    """A method's own defaults by slot, as they stand beside its own words.

    Raises:
        ValueError: a default that is not an option of the parts it names.
    """
    words: list[str] = []
    table = known(chosen(method, {}, words)).table
    found = {}
    for key, value in method.defaults.items():
        if key in AXES or key in ROLES:
            continue
        if key not in table:
            words.append(f"no chosen part of {method.name!r} has an option {key!r}")
            continue
        slot, option = table[key]
        found[place(slot, option)] = option.checked(value)
    if words:
        raise ValueError("; ".join(words))
    return found


def place(slot: Slot | None, option: Option) -> At:
    """Where an option of the table belongs."""
    return ("", option.name) if slot is None else (slot.name, option.name.removeprefix(f"{slot.name}_"))


def _around(modifier: Callable[[Elementwise], Elementwise], rule: Any, word: str) -> Elementwise:
    """An element-wise rule around a rule, where that is one."""
    if not isinstance(rule, Elementwise):
        raise UserError(
            f"{word} goes around a rule that treats elements alone; take rule=adam, or leave it out"
        )
    return modifier(rule)


def _value(option: Option, value: Any, text: bool) -> Plain:
    return option.checked(option.typed(value) if text and isinstance(value, str) else value)


def _unblocked(states: States) -> States:
    """The same precision without codes that share a scale: tensors of a few elements are not worth them."""
    if isinstance(states, str):
        return "fp32" if codec(states, signed=True, stream="").grain > 1 else states
    return {moment: str(_unblocked(word)) for moment, word in states.items()}
