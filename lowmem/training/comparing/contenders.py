"""Strategies as a comparison is asked for them: `adamw, galore(rank=64,lr=5e-4), adamw_8bit`.

Options stand in brackets. Learning rate, weight decay, betas and eps may stand among them, because strategies
step on different scales; betas take a semicolon: `adamw(betas=0.9;0.95)`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from lowmem.errors import UserError

HYPER = ("lr", "weight_decay", "betas", "eps")
_NAME = re.compile(r"\s*([A-Za-z0-9_./:-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Contender:
    """One strategy as it was asked for: its name, its options, and hyperparameters of its own."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    hyper: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        text = ",".join(f"{k}={v}" for k, v in (*self.options, *self.hyper))
        return f"{self.name}({text})" if text else self.name

    @property
    def folder(self) -> str:
        """A file name of its own."""
        text = str(self)
        mark, plain = hashlib.sha256(text.encode()).hexdigest()[:8], re.sub(r"[^\w-]+", "-", self.name)
        return plain if text == plain else f"{plain}-{mark}"


def contenders(text: str) -> list[Contender]:
    """Strategies from "adamw,galore(rank=64,lr=5e-4)".

    Raises:
        UserError: brackets that do not close, an option without a value, a strategy given twice.
    """
    found: list[Contender] = []
    for part in _split(text):
        match = _NAME.fullmatch(part)
        if match is None:
            raise UserError(f"cannot read strategy {part!r}; write NAME or NAME(option=value,...)")
        pairs = [_pair(item, part) for item in (match[2] or "").split(",") if item.strip()]
        hyper = tuple(pair for pair in pairs if pair[0] in HYPER)
        found.append(Contender(match[1], tuple(pair for pair in pairs if pair[0] not in HYPER), hyper))
    if twice := sorted({c.name for c in found if found.count(c) > 1}):
        raise UserError(f"{', '.join(twice)}: given more than once with the same options")
    if not found:
        raise UserError("no strategy to compare; give --optim adamw,galore,...")
    return found


def _pair(item: str, part: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise UserError(f"{part.strip()!r}: option {item.strip()!r} has no value; write option=value")
    return key.strip(), value.strip().replace(";", ",")


def _split(text: str) -> list[str]:
    """Parts between commas that are outside brackets."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or depth > 1:
            break
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    if depth != 0:
        raise UserError(f"brackets do not match in {text!r}; write galore(rank=64),adamw")
    return [p for p in [*parts, part] if p.strip()]
