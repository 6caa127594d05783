"""Which tensors are active now; what is put aside steps by the residual."""

from __future__ import annotations

from typing import Annotated

from lowmem.optim.schedules import Always, RandomBlocks, Schedule
from lowmem.strategies.options import Gap, Limits
from lowmem.strategies.parts import part


@part("schedule")
def always() -> Schedule:
    """Every tensor, at every step."""
    return Always()


@part("schedule")
def blocks(
    *, density: Annotated[float, Limits(least=0.0, most=1.0)] = 0.25, switch_gap: Gap = 200
) -> Schedule:
    """Some of the matrices at a time, in a random order; the others hold no state.

    Args:
        density: Share of the matrices that are active, by number; 0 for none, ever.
        switch_gap: Steps until others have their turn.
    """
    return RandomBlocks(density, switch_gap)
