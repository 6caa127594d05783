"""Where a gradient is seen: bases that are found anew every `update_proj_gap` steps."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.errors import UserError
from lowmem.optim.contract import Projector
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.coordinate import Columns, Elements
from lowmem.optim.projectors.dct import DCT
from lowmem.optim.projectors.dense import Orthonormal, power_iteration
from lowmem.optim.projectors.dense import svd as exact
from lowmem.optim.projectors.fisher import Fisher
from lowmem.optim.projectors.online import Online
from lowmem.optim.projectors.random import Gaussian
from lowmem.optim.projectors.random import random as uniform
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.strategies.options import Gap, Limits, Rank, Side, Size, States
from lowmem.strategies.parts import part


def framed(*, rank: Rank = 128, update_proj_gap: Gap = 200, proj_type: Side = "std") -> tuple[Frame, int]:
    """What nearly every subspace is told: how wide it is, when it is looked for anew, and on which side."""
    return Frame(rank, proj_type), update_proj_gap


@part("projector", first=framed)
def power(frame: Frame, gap: int) -> Projector:
    """The leading subspace, by warm-started power iteration."""
    return Orthonormal(frame, power_iteration, gap)


@part("projector", first=framed)
def svd(frame: Frame, gap: int) -> Projector:
    """The leading subspace, by an exact singular value decomposition."""
    return Orthonormal(frame, exact, gap)


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


@part("projector", first=framed)
def random(frame: Frame, gap: int) -> Projector:
    """A random subspace with an orthonormal basis."""
    return Orthonormal(frame, uniform, gap)


@part("projector", first=framed)
def gaussian(frame: Frame, gap: int) -> Projector:
    """A random sketch that is drawn again in every step and never held."""
    return Gaussian(frame, gap)


@part("projector", first=framed)
def dct(
    frame: Frame,
    gap: int,
    *,
    norm: Annotated[int, Limits(least=1, most=2)] = 1,
) -> Projector:
    """The cosines of which the gradient has most, of one basis for all tensors.

    Args:
        norm: Which norm of a coordinate counts, 1 or 2.
    """
    return DCT(frame, gap, norm)


@part("projector")
def online(
    *,
    rank: Rank = 128,
    rate: Annotated[float, Limits(above=0.0)] = 5.0,
    penalty: Annotated[float, Limits(least=0.0)] = 0.1,
    basis_rule: Literal["sgd", "adam"] = "sgd",
    basis_states: States = "fp32",
    proj_type: Side = "std",
) -> Projector:
    """A subspace that follows every gradient by a step of descent.

    Args:
        rate: Of the basis, in units of the learning rate.
        penalty: Weight of a basis that is not orthonormal.
        basis_rule: How a step of the basis is made.
        basis_states: Precision of the moments of that.
    """
    if basis_rule == "sgd" and basis_states != "fp32":
        raise UserError(
            f"basis_states={basis_states} would have no effect: a basis that descends holds no moments; "
            f"take basis_rule=adam, or leave it out"
        )
    rule = coded(Adam(), basis_states) if basis_rule == "adam" else coded(SGD())
    return Online(Frame(rank, proj_type), rate, penalty, rule)


@part("projector")
def fisher(*, rank: Size = 0.005) -> Projector:
    """The single elements with the largest gradients at first, for good; all others stay as they are.

    Args:
        rank: Elements that are seen of a tensor, or their share.
    """
    return Fisher(rank)
