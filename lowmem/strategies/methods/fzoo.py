"""FZOO (arXiv 2506.09034): one-sided slopes, and steps whose length the spread of the losses sets.

    d = sum_i (L(W + eps z_i) - L(W)) / (N std_i L(W + eps z_i)) z_i
    W <- (1 - lr wd) W - lr d

with N directions of signs. The radius cancels, and so does the scale of the loss: lr
is a length (5e-5 for a model of 13 billion weights). N + 1 forward passes for N
directions; several may run at once, at the cost of as many copies of a module.

Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights
once more for each point `at_once`.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA, OneSided
from lowmem.strategies.registry import register


@register(paper="2506.09034")
def fzoo(
    *,
    eps_perturb: float = 1e-4,
    noise: Literal["rademacher", "gaussian"] = "rademacher",
    queries: int = 8,
    at_once: int = 1,
) -> Strategy:
    """Many one-sided slopes, divided by the spread of their losses.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Signs as in the paper, or normal numbers.
        queries: Directions of a step, 2 or more, one forward pass each and one more.
        at_once: Points that one forward pass evaluates.
    """
    rule = coded(SGD())
    source = SPSA(eps_perturb, noise, queries, OneSided(spread=True), at_once=at_once)
    return Strategy(rules={"matrix": rule, "other": rule}, source=source)
