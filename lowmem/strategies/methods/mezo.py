"""MeZO (arXiv 2305.17333): fine-tuning by forward passes alone.

    c = (L(W + eps z) - L(W - eps z)) / (2 eps)
    W <- (1 - lr wd) W - lr c z

z is new in every step and is drawn again from its name when the step is taken.
Probes leave the weights bit for bit as they are, and 16-bit weights are rounded
at random, so that steps far below their spacing are taken with the right mean.
Weights are trained by the memory of inference; it takes ten to a hundred times
the steps of AdamW, and a learning rate around 1e-6 (1e-4 for adapters).

Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights
once more.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA
from lowmem.strategies.registry import register


@register(paper="2305.17333")
def mezo(
    *,
    eps_perturb: float = 1e-3,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: int = 1,
) -> Strategy:
    """Two forward passes instead of a gradient, and no state.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers as in the paper, or signs (cheaper to draw, slightly less variance).
        queries: Directions averaged in each step, two forward passes each.
    """
    rule = coded(SGD())
    return Strategy(rules={"matrix": rule, "other": rule}, source=SPSA(eps_perturb, noise, queries))
