"""Which methods and parts a test of every one of them runs over."""

from __future__ import annotations

import lowmem
from lowmem.strategies import parts
from lowmem.strategies.registry import Entry


def on_any_model() -> dict[str, Entry]:
    """Methods that train parameters; scales of quantized weights have their own tests."""
    found = lowmem.available().items()
    return {name: entry for name, entry in found if not lowmem.create(name).source.quantized}


def of_kind(kind: str) -> list[str]:
    """Parts of a kind that work on any model, sorted."""
    return [name for name, p in parts(kind).items() if kind != "source" or not p.factory().quantized]
