"""Where gradients come from."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.source import Source
from lowmem.sources import SPSA, Backprop
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part


@part("source")
def backprop() -> Source:
    """Backpropagation."""
    return Backprop()


@part("source")
def spsa(
    *,
    eps_perturb: Annotated[float, Limits(above=0.0)] = 1e-3,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: Annotated[int, Limits(least=1)] = 1,
) -> Source:
    """Two forward passes along a random direction; no backward pass.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers as in the paper, or signs (cheaper to draw, slightly less variance).
        queries: Directions averaged in each step, two forward passes each.
    """
    return SPSA(eps_perturb, noise, queries)
