"""Which tensors are active now; what is put aside steps by the residual."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.schedules import Always, Layers, RandomBlocks, Schedule
from lowmem.strategies.options import Gap, Limits
from lowmem.strategies.parts import part


@part("schedule")
def always() -> Schedule:
    """Every tensor, at every step."""
    return Always()


@part("schedule")
def blocks(
    *, density: Annotated[float, Limits(above=0.0, most=1.0)] = 0.25, switch_gap: Gap = 200
) -> Schedule:
    """Some of the matrices at a time, in a random order; the others hold no state.

    Args:
        density: Share of the matrices that are active, by number.
        switch_gap: Steps until others have their turn.
    """
    return RandomBlocks(density, switch_gap)


@part("schedule")
def layers(
    *,
    switch_gap: Gap = 50,
    order: Literal["random", "ascending", "descending", "drawn"] = "random",
    count: Annotated[int, Limits(least=1, small=1)] = 1,
    ends: bool = False,
) -> Schedule:
    """Some of the layers at a time, with all of their tensors; the others hold no state.

    Args:
        switch_gap: Steps until others have their turn.
        order: Every layer once in a sweep (at random, from the first or from the last), or drawn each time.
        count: Layers that are active together.
        ends: Let embedding, head and last norm, which are of no layer, be active throughout.
    """
    return Layers(switch_gap, order, count, ends)
