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

from lowmem.optim.elementwise import Elementwise, coded
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA, Curved, OneSided, TwoSided
from lowmem.sources.estimators import Estimator
from lowmem.strategies.registry import register

ESTIMATORS: dict[str, Estimator] = {"two_sided": TwoSided(), "one_sided": OneSided(), "curvature": Curved()}
RULES: dict[str, Elementwise] = {"sgd": SGD(), "adam": Adam()}


@register(paper="2305.17333")
def mezo(
    *,
    eps_perturb: float = 1e-3,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: int = 1,
    estimator: Literal["two_sided", "one_sided", "curvature"] = "two_sided",
    clip_slope: float = 0.0,
    at_once: int = 1,
    rule: Literal["sgd", "adam"] = "sgd",
) -> Strategy:
    """Two forward passes instead of a gradient, and no state.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: Normal numbers as in the paper, or signs (cheaper to draw, slightly less variance).
        queries: Directions averaged in each step, two forward passes each.
        estimator: Differences over both sides, to one shared base, or weighted by the curvature.
        clip_slope: Bound of a slope; 0 for none.
        at_once: Points that one forward pass evaluates, each with its own copy of a module.
        rule: The estimate itself, or Adam over it (8 bytes for each weight).
    """
    made = coded(RULES[rule])
    source = SPSA(eps_perturb, noise, queries, ESTIMATORS[estimator], clip_slope, at_once)
    return Strategy(rules={"matrix": made, "other": made}, source=source)
