"""A value as YAML, a flag or Python gives it, in the type of its field; a ValueError says what is allowed."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from lowmem.errors import nearest

MOST = {int: 2**31, float: 1e30}  # no machine counts steps beyond, and no 32-bit float multiplies beyond


ABSENT = {
    "hqq4": "transformers 5 neither loads nor saves layers of HQQ; take nf4, which qzo trains by the same "
    "settings, or train HQQ's layers in a loop of your own",
}
"""Words that are known elsewhere, and why they are none here."""


def unallowed(value: str, choices: tuple[str, ...]) -> str:
    """Why a word is none of the choices, and what to take."""
    return f"{value!r} is not allowed; {ABSENT.get(value) or nearest(value, choices)}"


def convert(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value`, from YAML, a flag or Python, in the type of its field; ValueError says what is allowed."""
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return convert(value, typing.get_args(hint)[0], metadata)
    if value is None:
        raise ValueError("no value given; leave the line out for the default")
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(value, typing.get_args(hint), metadata)
    if hint is bool:
        return _convert_bool(value)
    if hint is str:
        return _convert_text(_joined(value, metadata.get("several")), metadata["choices"])
    return _convert_number(value, hint, metadata)


def bracketed(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Values in which `optim: galore(rank=64)` is `optim: galore` and `optim_args: rank=64`; and problems."""
    optim = values.get("optim")
    if not isinstance(optim, str) or "(" not in optim:
        return values, []
    name, _, inside = optim.strip().partition("(")
    if not inside.endswith(")"):
        return values, [f"optim: {optim!r} lacks a bracket; write galore(rank=64,states=int8)"]
    if ")" in inside[:-1]:
        return values, [f"optim: {optim!r} names several strategies; a run takes one"]
    if values.get("optim_args"):
        return values, ["optim_args: the options of optim stand in its brackets already; give them once"]
    return {**values, "optim": name.strip(), "optim_args": inside[:-1]}, []


def _convert_tuple(value: Any, kinds: tuple[Any, ...], metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:  # texts: a lone one is a list of one
        items = [value] if isinstance(value, str) else value
        kinds = (kinds[0],) * (len(items) if isinstance(items, (list, tuple)) else 0)
    else:
        items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) != len(kinds):
        raise ValueError(f"{value!r} is not a list of {len(kinds) or 'text'} values")
    return tuple(convert(item, kind, metadata) for item, kind in zip(items, kinds, strict=True))


def _convert_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is not true or false")


def _joined(value: Any, sign: str | None) -> Any:
    """A list of texts as one, for a field that takes several."""
    texts = isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value)
    return sign.join(value) if sign and texts else value


def _convert_text(value: Any, choices: tuple[str, ...]) -> str:
    if isinstance(value, bool) and "on" in choices:  # YAML reads a bare on and off as true and false
        value = "on" if value else "off"
    if isinstance(value, Mapping):  # options of a strategy, one per line in YAML
        value = ",".join(f"{k}={_word(v)}" for k, v in value.items())
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text; put it in quotes")
    if choices and value not in choices:
        raise ValueError(unallowed(value, choices))
    return value


def _word(value: Any) -> Any:
    """The value of an option as it is written on a command line; several are joined as in a+b."""
    return str(value).lower() if isinstance(value, bool) else _joined(value, "+")


def _convert_number(value: Any, kind: type, metadata: Mapping[str, Any]) -> int | float:
    word = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)  # YAML reads 1e-4, without a point, as text
        whole = int(number) if kind is int else number
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not {word}") from None
    if whole != number:
        raise ValueError(f"{value!r} is not {word}")
    least, above = metadata["least"], metadata["above"]
    below = metadata["below"] if math.isfinite(metadata["below"]) else MOST[kind]
    if not math.isfinite(number) or number < least or number <= above or number >= below:
        limits = [(least, "at least"), (above, "above"), (below, "below")]
        allowed = " and ".join(f"{text} {limit:.10g}" for limit, text in limits if math.isfinite(limit))
        raise ValueError(f"{value} is out of range; it must be {allowed or 'finite'}")
    return whole
