"""Which strategies a test of every strategy runs over."""

from __future__ import annotations

import lowmem
from lowmem.strategies.registry import Entry


def on_any_model() -> dict[str, Entry]:
    """Strategies that train parameters; scales of quantized weights have their own tests."""
    found = lowmem.available().items()
    return {name: entry for name, entry in found if not lowmem.create(name).source.quantized}
