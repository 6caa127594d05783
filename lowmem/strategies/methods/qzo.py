"""QZO (arXiv 2505.13430): 4-bit weights fine-tuned by forward passes, through their scales alone.

    c = (L(s exp(eps z)) - L(s exp(-eps z))) / (2 eps),  |c| <= clip
    s <- max(s - lr s c z, 0)

The paper displaces scales by a fixed length, which suits one quantizer; here steps
are in proportion to the scale. Its settings for int4 (eps 1e-3, lr 1e-7, clip 100,
scales near 0.007) are eps 0.14, lr 2e-3, clip 0.7 in these units. Codes are never
touched, and the result is an ordinary quantized checkpoint. Where a backward pass
fits, LoRA on the same 4-bit weights learns more.

Bytes for an (m, n) weight in NF4: m n / 2 of codes and 4 m n / 64 of scales, no state
and no gradient; while a module runs, its scales once more.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA, Scales
from lowmem.strategies.registry import register


@register(paper="2505.13430")
def qzo(
    *,
    eps_perturb: float = 0.1,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: int = 1,
    clip_slope: float = 0.7,
) -> Strategy:
    """Zeroth-order steps of the scales of 4-bit weights; their codes stay.

    Args:
        eps_perturb: Radius of the perturbation, relative to a scale.
        noise: Normal numbers as in the paper, or signs.
        queries: Directions averaged in each step, two forward passes each.
        clip_slope: Bound of a slope; 0 for none.
    """
    rule = coded(SGD())
    source = SPSA(eps_perturb, noise, queries, clip=clip_slope, structure=Scales())
    return Strategy(rules={"matrix": rule, "other": rule}, source=source)
