"""Sparse MeZO (arXiv 2402.15751): only small weights are displaced and stepped.

    z_i = 0 where |w_i| > h,    h the `share` quantile of the sizes of its tensor
    c = (L(W + eps z) - L(W - eps z)) / (2 eps),    W <- (1 - lr wd) W - lr c z

The bound is read off the weights as they are, at each step, from a sample of the
tensor: no mask is held. (The paper takes it once, from the weights it starts with.)

Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights once
more.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA, Sparse
from lowmem.strategies.registry import register


@register(paper="2402.15751")
def sparse_mezo(
    *,
    eps_perturb: float = 1e-3,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: int = 1,
    share: float = 0.25,
) -> Strategy:
    """MeZO on the smallest weights of each tensor.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers, or signs.
        queries: Directions averaged in each step, two forward passes each.
        share: Part of each tensor that moves, above 0 and at most 1.
    """
    rule = coded(SGD())
    source = SPSA(eps_perturb, noise, queries, structure=Sparse(share))
    return Strategy(rules={"matrix": rule, "other": rule}, source=source)
