"""What is chosen on every axis, and which options may be written beside it.

A plain name is the frame's option (states, on_refresh, scale), or that of the one
chosen part that has it. Where two chosen parts have it, it is written AXIS_name, which
is always allowed: `projector_rank`, `residual_scale`; options of a modifier go by the
modifier's name, those of a role's rule by the role's (`embedding_beta1`), never plainly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import nearest
from lowmem.optim.codecs.blockwise import STATES
from lowmem.optim.elementwise import Elementwise, Moment
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.subspace import ON_REFRESH
from lowmem.strategies.method import AXES, NONE, ROLES, Method
from lowmem.strategies.options import Limits, Option
from lowmem.strategies.parts import Part, owners, parts

FRAME = ("states", "on_refresh", "scale")
"""The frame's own options, which no part can take the plain name of; the last two come with a projector."""


@dataclass(frozen=True)
class Slot:
    """A chosen part, under the name that its options may be prefixed by: an axis, a modifier or a role."""

    name: str
    part: Part


@dataclass(frozen=True)
class Words:
    """The choices: a word for each axis, rules of roles ("" where they have none of their own), modifiers."""

    axes: tuple[tuple[str, str], ...]
    roles: tuple[tuple[str, str], ...]
    modifiers: tuple[str, ...]

    def __getitem__(self, name: str) -> str:
        return dict(self.axes + self.roles)[name]


@dataclass(frozen=True)
class Known:
    """The options that may be written beside some words.

    Args:
        slots: the chosen parts, those of roles last.
        table: what a name stands for, long forms too; None for a slot is the frame.
        unclear: plain names that several parts share, with their long forms.
        short: the name under which a slot's option is shown.
    """

    slots: tuple[Slot, ...]
    table: Mapping[str, tuple[Slot | None, Option]]
    unclear: Mapping[str, tuple[str, ...]]
    short: Mapping[tuple[str, str], str]


def choices(axis: str) -> list[str]:
    """The words that an axis or a role may be."""
    kind = "rule" if axis in ROLES else axis.removesuffix("s")
    return [NONE, *parts(kind)] if AXES.get(axis) == NONE else list(parts(kind))


def chosen(method: Method, given: Mapping[str, Any], problems: list[str]) -> Words:
    """The words of a method with the user's choices; what cannot be chosen is told and left as it was."""

    def word(axis: str) -> str:
        value, allowed = method.word(axis, given), choices(axis)
        if value in allowed or (axis in ROLES and value == ""):
            return str(value)
        problems.append(f"unknown {axis} {value!r}; {nearest(str(value), allowed)}")
        return str(method.word(axis, {}))

    keys = ["modifiers", *(f"{role}_modifiers" for role in ROLES)]
    lists = [modifiers(key, method.word(key, given), problems) for key in keys]
    return Words(
        tuple((axis, word(axis)) for axis in AXES if axis != "modifiers"),
        tuple((role, word(role)) for role in ROLES),
        tuple(dict.fromkeys(one for some in lists for one in some)),
    )


def modifiers(key: str, text: Any, problems: list[str]) -> list[str]:
    """The names in "cautious+limit"; none in "none" or ""."""
    found = [one.strip() for one in str(text).split("+")] if text not in (NONE, "") else []
    known = parts("modifier")
    for one in found:
        if one == NONE:
            problems.append(f"{key} has {NONE!r} beside others in {text!r}; it stands alone, or is left out")
        elif one not in known:
            problems.append(f"unknown {key} {one!r}; {nearest(one, [NONE, *known])}")
        elif found.count(one) > 1:
            problems.append(f"{key} has {one!r} twice; give it once")
    return [one for one in dict.fromkeys(found) if one in known]


@functools.lru_cache(maxsize=1024)
def known(words: Words) -> Known:
    """The options that may be written beside these words."""
    slots = [Slot(axis, parts(axis)[word]) for axis, word in words.axes if word != NONE]
    slots += [Slot(word, parts("modifier")[word]) for word in words.modifiers]
    usual = words["other"] or words["rule"]
    of_roles = [Slot(role, parts("rule")[word or usual]) for role, word in words.roles]
    table: dict[str, tuple[Slot | None, Option]] = {o.name: (None, o) for o in _frame(words)}
    reserved = {*table, *FRAME}
    sharing: dict[str, list[Slot]] = {}
    for slot in (*slots, *of_roles):
        for option in slot.part.options.values():
            long = f"{slot.name}_{option.name}"
            table[long] = (slot, replace(option, name=long))
            if slot.name not in ROLES:
                sharing.setdefault(option.name, []).append(slot)
    plain = {name: some[0] for name, some in sharing.items() if len(some) == 1 and name not in reserved}
    table |= {name: (slot, slot.part.options[name]) for name, slot in plain.items()}
    unclear = {
        name: tuple(f"{slot.name}_{name}" for slot in some)
        for name, some in sharing.items()
        if len(some) > 1 and name not in reserved
    }
    short = {
        (slot.name, name): name if plain.get(name) == slot else f"{slot.name}_{name}"
        for slot in (*slots, *of_roles)
        for name in slot.part.options
    }
    return Known((*slots, *of_roles), table, unclear, short)


def _frame(words: Words) -> list[Option]:
    """The frame's own options: precision of moments, and what a projection is done with."""
    rule = parts("rule")[words["rule"]]
    found = [_states("states", "fp32", "Precision of the moments, of every role.")]
    found += [_states(f"{one}_states", "", f"Precision of {one}.") for one in moments_of(rule)]
    for role in ROLES:
        found.append(_states(f"{role}_states", "", f"Precision of the moments of {role} tensors."))
        found.append(
            Option(f"{role}_modifiers", str, "", f"Modifiers of {role} tensors, as in a+b; or none.")
        )
    if words["projector"] != NONE:
        found.append(
            Option("on_refresh", str, "keep", "What becomes of the moments at a refresh.", ON_REFRESH)
        )
        scale = Limits(above=0.0)
        found.append(
            Option("scale", float, 1.0, "Factor of the learning rate of what is seen.", limits=scale)
        )
    return found


def _states(name: str, default: str, help: str) -> Option:
    return Option(name, str, default, help, STATES)


@functools.lru_cache(maxsize=256)
def moments_of(part: Part) -> Mapping[str, Moment]:
    """The moments of a rule that may have a precision each; none where it holds them in its own way."""
    if part.told:
        return {}
    rule = part.make({name: option.default for name, option in part.options.items()})
    return rule.moments if isinstance(rule, Elementwise) else {}


def holds_moments(part: Part) -> bool:
    """Whether the precision of moments means something to a rule, or to a modifier that goes around one."""
    if part.kind == "modifier":
        plain = {name: option.default for name, option in part.options.items()}
        return not isinstance(part.make(plain), Modifier)
    return "states" in part.told or bool(moments_of(part))


def stranger(key: str, words: Words) -> str:
    """Why an option cannot be written beside these words, and what to do."""
    table = known(words)
    if key in table.unclear:
        return f"several parts have {key}; write {' or '.join(table.unclear[key])}"
    if key in FRAME:
        return f"{key} comes with a projector; choose one, as in projector=power"
    if key.endswith("_states") and key.removesuffix("_states") in _all_moments():
        return f"rule={words['rule']} holds no {key.removesuffix('_states')}; leave {key} out"
    kind, _, rest = key.partition("_")
    origins = owners(rest, kind) if kind in AXES else owners(key)
    if origins:
        return f"{key} comes with {' or '.join(origins)}; choose that, or leave it out"
    return f"no option {key!r}; {nearest(key, [*AXES, *ROLES, *shown(table)])}"


def _all_moments() -> set[str]:
    return {one for part in parts("rule").values() for one in moments_of(part)}


def shown(table: Known) -> list[str]:
    """The names under which options are listed: plain ones, and long ones where there is no plain one."""
    roles = tuple(f"{role}_" for role in ROLES)
    own = [name for (slot, _), name in table.short.items() if slot not in ROLES]
    return [
        *own,
        *(name for name, (slot, _) in table.table.items() if slot is None and not name.startswith(roles)),
    ]
