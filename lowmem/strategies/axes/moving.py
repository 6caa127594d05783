"""Where a gradient is seen: bases that are moved, drawn, or replaced when it pays."""

from __future__ import annotations

import math
from typing import Annotated

from lowmem.optim.contract import Projector
from lowmem.optim.projectors.dense import Frame, Orthonormal, power_iteration
from lowmem.optim.projectors.grassmann import Track, Walk
from lowmem.optim.projectors.lazy import Lazy
from lowmem.optim.projectors.random import Drawn, Switch
from lowmem.strategies.axes.projectors import Side
from lowmem.strategies.options import Gap, Limits, Size
from lowmem.strategies.parts import part


@part("projector")
def track(
    *,
    rank: Size = 128,
    update_proj_gap: Gap = 200,
    proj_type: Side = "std",
    rate: Annotated[float, Limits(above=0.0)] = 1.0,
) -> Projector:
    """A subspace that turns, now and then, towards what it misses of a gradient.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between turns.
        proj_type: Side that is projected; std is the short one.
        rate: Radians of a turn where a gradient lies half in the subspace and half beside it.
    """
    return Orthonormal(Frame(rank, proj_type), Track(rate), update_proj_gap)


@part("projector")
def walk(
    *,
    rank: Size = 128,
    update_proj_gap: Gap = 200,
    proj_type: Side = "std",
    angle: Annotated[float, Limits(above=0.0, most=math.pi / 2)] = 0.5,
) -> Projector:
    """A subspace that turns at random from a leading one.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between turns.
        proj_type: Side that is projected; std is the short one.
        angle: The largest angle of a turn, in radians.
    """
    return Orthonormal(Frame(rank, proj_type), Walk(angle), update_proj_gap)


@part("projector")
def jump(*, rank: Size = 128, update_proj_gap: Gap = 200, proj_type: Side = "std") -> Projector:
    """A random subspace that is drawn again in every step and never held.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps with the same subspace.
        proj_type: Side that is projected; std is the short one.
    """
    return Drawn(Frame(rank, proj_type), update_proj_gap)


@part("projector")
def switch(
    *,
    rank: Size = 128,
    update_proj_gap: Gap = 200,
    proj_type: Side = "std",
    after: Annotated[int, Limits(least=0, small=4)] = 1000,
) -> Projector:
    """The leading subspace at first, random ones later.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between subspaces.
        proj_type: Side that is projected; std is the short one.
        after: Steps until subspaces are random.
    """
    return Orthonormal(Frame(rank, proj_type), Switch(after), update_proj_gap)


@part("projector")
def lazy(
    *,
    rank: Size = 128,
    update_proj_gap: Gap = 200,
    proj_type: Side = "std",
    threshold: Annotated[float, Limits(above=0.0, most=1.0)] = 0.4,
) -> Projector:
    """The leading subspace in 4 bits, replaced less often once it stands still.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between looks at the subspace.
        proj_type: Side that is projected; std is the short one.
        threshold: Mean likeness of subspaces from which the time to the next one doubles.
    """
    return Lazy(Frame(rank, proj_type), power_iteration, update_proj_gap, threshold)
