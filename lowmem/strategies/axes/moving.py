"""Where a gradient is seen: bases that are moved, drawn, or replaced when it pays."""

from __future__ import annotations

import math
from typing import Annotated

from lowmem.optim.contract import Projector
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.blend import Blend
from lowmem.optim.projectors.dense import Orthonormal, power_iteration
from lowmem.optim.projectors.drift import Drift
from lowmem.optim.projectors.grassmann import Track, Walk
from lowmem.optim.projectors.lazy import Lazy
from lowmem.optim.projectors.random import Drawn, Switch
from lowmem.strategies.axes.projectors import framed
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part


@part("projector", first=framed)
def track(
    frame: Frame,
    gap: int,
    *,
    rate: Annotated[float, Limits(above=0.0)] = 1.0,
) -> Projector:
    """A subspace that turns, now and then, towards what it misses of a gradient.

    Args:
        rate: Radians of a turn where a gradient lies half in the subspace and half beside it.
    """
    return Orthonormal(frame, Track(rate), gap)


@part("projector", first=framed)
def walk(
    frame: Frame,
    gap: int,
    *,
    angle: Annotated[float, Limits(above=0.0, most=math.pi / 2)] = 0.5,
) -> Projector:
    """A subspace that turns at random from a leading one.

    Args:
        angle: The largest angle of a turn, in radians.
    """
    return Orthonormal(frame, Walk(angle), gap)


@part("projector", first=framed)
def jump(frame: Frame, gap: int) -> Projector:
    """A random subspace that is drawn again in every step and never held."""
    return Drawn(frame, gap)


@part("projector", first=framed)
def switch(
    frame: Frame,
    gap: int,
    *,
    after: Annotated[int, Limits(least=0, small=4)] = 1000,
) -> Projector:
    """The leading subspace at first, random ones later.

    Args:
        after: Steps until subspaces are random.
    """
    return Orthonormal(frame, Switch(after), gap)


@part("projector", first=framed)
def lazy(
    frame: Frame,
    gap: int,
    *,
    threshold: Annotated[float, Limits(above=0.0, most=1.0)] = 0.4,
) -> Projector:
    """The leading subspace in 4 bits, replaced less often once it stands still.

    Args:
        threshold: Mean likeness of subspaces (unrelated: 0) from which the time to the next one doubles.
    """
    return Lazy(frame, power_iteration, gap, threshold)


@part("projector", first=framed, update_proj_gap=50)
def drift(
    frame: Frame,
    gap: int,
    *,
    threshold: Annotated[float, Limits(above=0.0, most=1.0)] = 0.5,
    probes: Annotated[int, Limits(least=1)] = 16,
) -> Projector:
    """The leading subspace, replaced once gradients have drifted out of it.

    Args:
        update_proj_gap: Steps between looks at how far gradients have drifted.
        threshold: Share of the way of unit gradients that must lie in the subspace.
        probes: Random directions by which that way is measured.
    """
    return Drift(frame, update_proj_gap=gap, threshold=threshold, probes=probes)


@part("projector", first=framed, rank=16, update_proj_gap=1)
def blend(
    frame: Frame,
    gap: int,
    *,
    rho: Annotated[float, Limits(least=0.0, below=1.0)] = 0.908,
) -> Projector:
    """The leading subspace of momentum and gradient, which moves a little at every step.

    Args:
        rho: Share of the momentum.
    """
    return Blend(frame, update_proj_gap=gap, rho=rho)
