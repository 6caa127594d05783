"""Which methods and parts a test of every one of them runs over."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest

import lowmem
from lowmem.optim.contract import is_pointwise
from lowmem.strategies import parts
from lowmem.strategies.registry import Entry

FIRST = ("adafactor", "adamw", "adamw_8bit", "frugal", "galore", "mezo", "microadam")
"""Methods of the first release."""


@functools.cache
def on_any_model() -> dict[str, Entry]:
    """Methods that train parameters; scales of quantized weights have their own tests."""
    found = lowmem.available().items()
    return {name: entry for name, entry in found if not lowmem.create(name).source.quantized}


@functools.cache
def unlike() -> list[str]:
    """Methods of which each is of another make for those who call the optimizer; the first release's all.

    A trainer sees whether there are gradients, who rests, what is evaluated beside the weights and how many
    kinds of rule there are, not the arithmetic: that is the contract suite's, which runs over every method.
    """
    found: dict[Any, str] = {_make(name): name for name in reversed(on_any_model())}
    return sorted({*found.values(), *FIRST})


STAND_FOR_OTHERS = (*FIRST, "badam", "misa")
"""Those whose runs through a trainer are never left out: the first release's, and who rests by turns."""


def by_turns(names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test that trains: those that others stand for are thorough."""
    return [
        name if name in STAND_FOR_OTHERS else pytest.param(name, marks=pytest.mark.thorough) for name in names
    ]


def _make(name: str) -> tuple[Any, ...]:
    strategy = lowmem.create(name)
    rule = strategy.rules["matrix"]
    kind = "pointwise" if is_pointwise(rule) else "subspace" if hasattr(rule, "projector") else "whole"
    beside = type(rule).beside.__qualname__
    return kind, type(strategy.schedule), type(strategy.source), beside, len(set(strategy.rules.values()))


def of_kind(kind: str) -> list[str]:
    """Parts of a kind that work on any model, sorted."""
    return [name for name, p in parts(kind).items() if kind != "source" or not p.factory().quantized]
