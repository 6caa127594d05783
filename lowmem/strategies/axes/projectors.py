"""Where a gradient is seen: bases that are found anew every `update_proj_gap` steps."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.projectors import Projector
from lowmem.optim.projectors.coordinate import Columns, Elements
from lowmem.optim.projectors.dense import Find, Frame, Orthonormal, power_iteration
from lowmem.optim.projectors.dense import svd as exact
from lowmem.strategies.options import Gap, Limits, Size
from lowmem.strategies.parts import part

Side = Literal["std", "reverse_std", "left", "right"]


def _dense(find: Find, rank: float, proj_type: str, gap: int) -> Projector:
    return Orthonormal(Frame(rank, proj_type), find, gap)


@part("projector")
def power(*, rank: Size = 128, update_proj_gap: Gap = 200, proj_type: Side = "std") -> Projector:
    """The leading subspace, by warm-started power iteration.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between refreshes of the subspace.
        proj_type: Side that is projected; std is the short one.
    """
    return _dense(power_iteration, rank, proj_type, update_proj_gap)


@part("projector")
def svd(*, rank: Size = 128, update_proj_gap: Gap = 200, proj_type: Side = "std") -> Projector:
    """The leading subspace, by an exact singular value decomposition.

    Args:
        rank: Directions of the subspace, or their share of the side; clipped to the short side.
        update_proj_gap: Steps between refreshes of the subspace.
        proj_type: Side that is projected; std is the short one.
    """
    return _dense(exact, rank, proj_type, update_proj_gap)


@part("projector")
def columns(*, rank: Size = 0.25, update_proj_gap: Gap = 200) -> Projector:
    """A random subset of the columns.

    Args:
        rank: Columns that are seen, or their share.
        update_proj_gap: Steps until other columns have their turn.
    """
    return Columns(rank, update_proj_gap)


@part("projector")
def randk(
    *, rank: Annotated[float, Limits(size=True, small=0.25)] = 0.25, update_proj_gap: Gap = 200
) -> Projector:
    """A random subset of single elements.

    Args:
        rank: Elements that are seen of each 256, or their share.
        update_proj_gap: Steps until other elements have their turn.
    """
    return Elements(rank, update_proj_gap)
