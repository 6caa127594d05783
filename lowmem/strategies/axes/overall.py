"""Rules that are told more than the gradient of their tensor: sums over the model, loss, curvature."""

from __future__ import annotations

from typing import Annotated

from lowmem.optim.contract import AnyRule
from lowmem.optim.rules.measured.curvature import Sophia
from lowmem.optim.rules.measured.overall import DoG, LDoG, MoMo
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part

Distance = Annotated[float, Limits(above=0.0, small=0.1)]


@part("rule")
def dog(*, reps_rel: Distance = 1e-6) -> AnyRule:
    """DoG: descent at a rate of distance over gradients, of the model as one.

    Args:
        reps_rel: First distance, in units of the model's length.
    """
    return DoG(reps_rel)


@part("rule")
def ldog(*, reps_rel: Distance = 1e-6) -> AnyRule:
    """L-DoG: descent at a rate of distance over gradients, tensor by tensor.

    Args:
        reps_rel: First distance, in units of the weight's length.
    """
    return LDoG(reps_rel)


@part("rule")
def momo(*, states: str, adaptive: bool = False, least: float = 0.0) -> AnyRule:
    """MoMo: momentum no farther than to where a model of the loss is at its least.

    Args:
        adaptive: Adam instead of momentum.
        least: What the loss cannot fall below.
    """
    return MoMo.of(states, adaptive=adaptive, least=least)


@part("rule")
def sophia(
    *,
    states: str,
    rho: Annotated[float, Limits(above=0.0)] = 0.04,
    every: Annotated[int, Limits(least=1, small=4)] = 10,
) -> AnyRule:
    """Sophia: momentum over the curvature, no element farther than lr.

    Args:
        rho: Share of the curvature; tune it so that a stable part of the elements is not clipped.
        every: Steps between probes of the curvature, a backward pass each.
    """
    return Sophia.of(states, rho=rho, every=every)
