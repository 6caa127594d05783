"""Options: typed keyword arguments of a factory, read off its signature and the Args of its docstring.

    def columns(*, rank: Size = 0.25, update_proj_gap: Gap = 200) -> Projector

A type is int, float, str, bool or a `Literal` of words; `Annotated[..., Limits(...)]`
says which numbers are allowed and what suits a small test, and a sentence in it what an option
of this type means where the Args say nothing else. A size has one option: 1 or more is a number,
below 1 a share.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lowmem.errors import UserError, nearest
from lowmem.optim.strategy import Plain


@dataclass(frozen=True)
class Limits:
    """What a number may be, and what tests need to know of it.

    Args:
        least, most: smallest and largest value; above, below: the same, itself not allowed.
        size: a whole number from 1 on, or a share below 1.
        small: the value for models of a few thousand elements; the default, if None.
        gap: it counts steps until something is done anew.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    size: bool = False
    small: Plain | None = None
    gap: bool = False

    def refusal(self, value: float) -> str:
        """What is asked of the number, where it is not met.

        >>> Limits(above=0.0, most=1.0).refusal(2.0)
        'above 0, at most 1'
        """
        tests = (
            ("at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        asked = [(word, limit, test) for word, limit, test in tests if limit is not None]
        met = all(test(value, limit) for _, limit, test in asked)
        return "" if met else ", ".join(f"{word} {limit:g}" for word, limit, _ in asked)


Size = Annotated[float, Limits(size=True, small=3)]
"""How much is seen: a number from 1 on, or a share below 1."""

Gap = Annotated[int, Limits(least=1, small=4, gap=True), "Steps until the subspace is looked for anew."]

Rank = Annotated[Size, "Directions of the subspace, or their share of the side; clipped to the short side."]

Side = Annotated[
    Literal["std", "reverse_std", "left", "right", "auto"],
    "Side that is projected; std is the short one, auto the one that ranks do not share.",
]

States = Literal["fp32", "bf16", "int8", "int4", "companded8"]
"""How a moment is held, see `codecs.blockwise.STATES`."""

SubsetSize = Annotated[int, Limits(least=0)]
"""Elements that share a second moment."""


@dataclass(frozen=True)
class Option:
    """One option of a part, a method or the frame.

    Args:
        name: as it is written; type: int, float, str or bool.
        default: its value when it is not given.
        help: one sentence.
        choices: the words it may be, or None.
        limits: which numbers are allowed.
    """

    name: str
    type: type
    default: Plain
    help: str
    choices: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def kind(self) -> str:
        """What it is, for people: "int", "float", "true or false", a size."""
        if self.limits.size:
            return "a whole number from 1 on, or a share between 0 and 1"
        return "true or false" if self.type is bool else self.type.__name__

    def typed(self, text: str) -> Plain:
        """The value that a text on the command line stands for; it still has to be checked.

        Raises:
            UserError: the text is not of the option's type.
        """
        if self.type is str:
            return text
        if self.type is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if text.lower() not in words:
                raise UserError(f"{self.name} is {self.kind}, got {text!r}")
            return words[text.lower()]
        try:
            return typing.cast(Plain, self.type(text))
        except ValueError:
            raise UserError(f"{self.name} is {self.kind}, got {text!r}") from None

    def checked(self, value: Any) -> Plain:
        """The value in the option's type.

        Raises:
            UserError: of another type, not one of the words, or outside the limits.
        """
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if type(value) is not self.type:
            raise UserError(f"{self.name} is {self.kind}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.name} is a finite number, got {value}")
        if self.choices and value not in self.choices:
            raise UserError(f"unknown {self.name} {value!r}; {nearest(str(value), self.choices)}")
        number = typing.cast(float, value)  # words have no limits
        if self.limits.size:
            return self._sized(number)
        if refusal := self.limits.refusal(number):
            raise UserError(f"{self.name} must be {refusal}, got {value}")
        return typing.cast(Plain, value)

    def _sized(self, value: float) -> Plain:
        if value >= 1.0 and value % 1.0 == 0.0:
            return int(value)
        if 0.0 < value < 1.0:
            return value
        raise UserError(f"{self.name} is {self.kind}, got {value:g}")


def _as_float(value: int) -> float:
    """As a float; infinite where none is so large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def options_of(factory: Callable[..., Any], told: Collection[str] = ()) -> dict[str, Option]:
    """The options of a factory by name; `told` are parameters that the caller fills in itself.

    Raises:
        ValueError: an option without a plain type, a default or a help line.
    """
    hints = typing.get_type_hints(factory, include_extras=True)
    helps = helps_of(factory)
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name in told:
            continue
        hint, limits, usual = _parted(hints.get(name))
        help = helps.get(name, usual)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
        kind = str if choices else hint
        if parameter.default is parameter.empty or kind not in (int, float, str, bool) or not help:
            raise ValueError(
                f"option {name!r} of {factory.__name__!r} needs a plain type, a default and a help line"
            )
        found[name] = Option(name, kind, parameter.default, help, choices, limits)
    return found


def _parted(hint: Any) -> tuple[Any, Limits, str]:
    """A type, its limits, and what an option of it means."""
    if typing.get_origin(hint) is not Annotated:
        return hint, Limits(), ""
    base, *marks = typing.get_args(hint)
    limits = next((mark for mark in marks if isinstance(mark, Limits)), Limits())
    return base, limits, next((mark for mark in marks if isinstance(mark, str)), "")


def helps_of(factory: Callable[..., Any]) -> dict[str, str]:
    """The lines of a docstring's Args section, by name."""
    found: dict[str, str] = {}
    section = (inspect.getdoc(factory) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE):
        found[match[1]] = " ".join(match[2].split())
    return found
