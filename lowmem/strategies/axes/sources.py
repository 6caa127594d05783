"""Where gradients come from."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.source import Source
from lowmem.sources import (
    SPSA,
    Backprop,
    Curved,
    ForwardGradient,
    LowRank,
    Mixed,
    OneSided,
    Scales,
    Sparse,
    TwoSided,
)
from lowmem.sources.estimators import Estimator
from lowmem.strategies.options import Gap, Limits
from lowmem.strategies.parts import part

Radius = Annotated[float, Limits(above=0.0)]
Noise = Literal["gaussian", "rademacher"]
Count = Annotated[int, Limits(least=1)]
Bound = Annotated[float, Limits(least=0.0)]

ESTIMATORS: dict[str, Estimator] = {
    "two_sided": TwoSided(),
    "one_sided": OneSided(),
    "curvature": Curved(),
}


@part("source")
def backprop() -> Source:
    """Backpropagation."""
    return Backprop()


@part("source")
def spsa(
    *,
    eps_perturb: Radius = 1e-3,
    noise: Noise = "gaussian",
    queries: Count = 1,
    estimator: Literal["two_sided", "one_sided", "curvature"] = "two_sided",
    clip_slope: Bound = 0.0,
    at_once: Count = 1,
) -> Source:
    """Two forward passes along a random direction; no backward pass.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers as in the paper, or signs (cheaper to draw, slightly less variance).
        queries: Directions averaged in each step, two forward passes each; one, and one more for all of
            them, where the estimator is one_sided.
        estimator: Differences over both sides; to one shared base; or over both sides, and shorter along
            directions of large curvature.
        clip_slope: Bound of a slope; 0 for none.
        at_once: Points that one forward pass evaluates, each with its own copy of a module.
    """
    return SPSA(eps_perturb, noise, queries, ESTIMATORS[estimator], clip_slope, at_once)


@part("source")
def spread_spsa(
    *,
    eps_perturb: Radius = 1e-3,
    noise: Noise = "rademacher",
    queries: Annotated[int, Limits(least=2)] = 8,
    at_once: Count = 1,
) -> Source:
    """Forward passes along several directions; differences to a shared base over the spread of the losses.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Signs as in the paper, or normal numbers.
        queries: Directions of a step, one forward pass each and one more.
        at_once: Points that one forward pass evaluates, each with its own copy of a module.
    """
    return SPSA(eps_perturb, noise, queries, OneSided(spread=True), at_once=at_once)


def perturbed(
    *, eps_perturb: Radius = 1e-3, noise: Noise = "gaussian", queries: Count = 1
) -> tuple[float, Noise, int]:
    """What perturbations of some structure share.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers as in the paper, or signs.
        queries: Directions averaged in each step, two forward passes each.
    """
    return eps_perturb, noise, queries


@part("source", first=perturbed)
def low_rank_spsa(eps: float, noise: Noise, queries: int, *, rank: Count = 2, update_gap: Gap = 50) -> Source:
    """Two forward passes along a direction of low rank.

    Args:
        noise: What the two sides are made of: normal numbers as in the paper, or signs.
        rank: Of a direction.
        update_gap: Steps for which one side stays.
    """
    return SPSA(eps, noise, queries, structure=LowRank(rank, update_gap))


@part("source", first=perturbed)
def sparse_spsa(
    eps: float, noise: Noise, queries: int, *, share: Annotated[float, Limits(above=0.0, most=1.0)] = 0.25
) -> Source:
    """Two forward passes along a direction of small weights alone.

    Args:
        share: Part of each tensor that moves, that of its smallest weights.
    """
    return SPSA(eps, noise, queries, structure=Sparse(share))


@part("source", first=perturbed)
def momentum_spsa(
    eps: float,
    noise: Noise,
    queries: int,
    *,
    total_steps: Annotated[int, Limits(least=20, small=40)] = 20_000,
) -> Source:
    """Two forward passes along noise mixed with the direction before.

    Args:
        total_steps: Of the run: over them noise gives way to momentum.
    """
    return SPSA(eps, noise, queries, structure=Mixed(total_steps))


@part("source", first=perturbed, eps_perturb=0.1)
def quantized_spsa(eps: float, noise: Noise, queries: int, *, clip_slope: Bound = 0.7) -> Source:
    """Two forward passes along a direction of the scales of 4-bit weights.

    Args:
        eps_perturb: Radius of the perturbation, relative to a scale.
        clip_slope: Bound of a slope; 0 for none.
    """
    return SPSA(eps, noise, queries, clip=clip_slope, structure=Scales())


@part("source")
def tangents(*, noise: Noise = "gaussian", queries: Count = 1, clip_slope: Bound = 0.0) -> Source:
    """One forward pass that carries a random direction along; no backward pass, and no radius.

    Args:
        noise: Normal numbers as in the paper, or signs (cheaper to draw, slightly less variance).
        queries: Directions averaged in each step, one pass each.
        clip_slope: Bound of a slope; 0 for none.
    """
    return ForwardGradient(noise, queries, clip_slope)
