"""Which tensors are active now; what is put aside steps by the residual."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.schedules.schedule import Always, Schedule
from lowmem.optim.schedules.turns import Layers, RandomBlocks
from lowmem.optim.schedules.watching import Converged, Important
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


@part("schedule")
def importance(
    *,
    share: Annotated[float, Limits(above=0.0, most=1.0, small=0.5)] = 0.03,
    switch_gap: Gap = 50,
    eta: Annotated[float, Limits(least=0.0)] = 1.0,
    ends: bool = False,
) -> Schedule:
    """Some of the matrices at a time, those more often whose gradients are larger.

    Args:
        share: Share of the matrices that are active, by number.
        switch_gap: Steps until others have their turn.
        eta: How much larger gradients count; 0 for not at all.
        ends: Let all that is no matrix be active throughout.
    """
    return Important(switch_gap, share, eta, ends)


@part("schedule")
def convergence(
    *,
    threshold: Annotated[float, Limits(above=0.0)] = 1e-6,
    grace: Annotated[int, Limits(least=0, small=4)] = 1000,
    switch_gap: Gap = 100,
    by: Literal["change", "size"] = "change",
) -> Schedule:
    """Each matrix until its gradients have settled.

    Args:
        threshold: Mean size of a gradient's elements, or its change, below which a matrix is frozen.
        grace: Steps before anything is frozen; about half of a run.
        switch_gap: Steps that a mean is taken of.
        by: What is held against the threshold.
    """
    return Converged(switch_gap, threshold, grace, by)
