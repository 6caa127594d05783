"""Options that were given and would do nothing, or not what they say, beside the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lowmem.optim.contract import Projector
from lowmem.optim.strategy import Plain
from lowmem.strategies.method import NONE, ROLES, Method
from lowmem.strategies.words import Known, Slot, Words, holds_moments


class Reading(Protocol):
    """What is looked at of a composition; see `compose.Composition`."""

    method: Method
    words: Words
    known: Known
    given: dict[str, Plain]

    def make(self, name: str, **told: Any) -> Any:
        """The part on an axis or at a role, or None and one problem more."""


def without_effect(found: Reading) -> Iterator[str]:
    """A sentence for each option of a composition that was given and does nothing."""
    words = found.words
    if words["residual"] != "drop" and words["projector"] == NONE and words["schedule"] == "always":
        yield (
            f"residual={words['residual']} has nothing to step by where everything is seen; choose "
            f"a projector or schedule=blocks, or take residual=drop"
        )
    if any(holds_moments(slot.part) for slot in found.known.slots if slot.part.kind == "modifier"):
        return
    rules = {slot.name: slot for slot in found.known.slots if slot.part.kind == "rule"}
    for key, names in {"states": list(rules), **{f"{r}_states": [r] for r in ROLES}}.items():
        word = str(found.given.get(key, ""))
        usual = word in ("fp32", found.method.defaults.get(key))
        if word and not any(_holds(found, rules[name], word, usual=usual) for name in names):
            yield f"rule {words[names[0]] or words['rule']} holds no moments; leave {key} out"


def _holds(found: Reading, slot: Slot, states: str, *, usual: bool) -> bool:
    """Whether the rule at a slot holds moments: if `states` is not usual, by what the rule makes of it."""
    if usual or "states" not in slot.part.told:
        return holds_moments(slot.part)
    one, other = (found.make(slot.name, states=word, inside=False) for word in (states, "fp32"))
    return one is None or bool(one != other)


def never_renewed(found: Reading, projector: Projector) -> Iterator[str]:
    """What is wrong with an `on_refresh` that was given, where a projector has no refreshes."""
    given = found.given.get("on_refresh", "keep")
    if given not in ("keep", found.method.defaults.get("on_refresh")) and not projector.renews:
        yield (
            f"on_refresh={given} would have no effect: projector={found.words['projector']} never takes "
            f"other coordinates; leave it out"
        )


def restarted(rule: Any, modifiers: Mapping[str, Any], on_refresh: str) -> Iterator[str]:
    """What is wrong with a schedule that counts the age of moments, where they start afresh again and again.

    Args:
        rule: as it was made; modifiers: around it; on_refresh: of its subspace, "" where it has none.
    """
    option = getattr(rule, "paced", "")
    resets = {name: f"leave {name} out" for name, one in modifiers.items() if getattr(one, "resets", False)}
    if on_refresh == "reset":
        resets["on_refresh=reset"] = "take on_refresh=keep"
    for name, remedy in resets.items() if option else ():
        yield f"{option} counts steps by the age of moments, which {name} sets to 0 again and again; {remedy}"
