"""MicroAdam (arXiv 2405.15593): Adam from a window of the last sparse gradients.

    a = g + e,  V = the largest 1 % of a,  e = 4 bits of the rest
    m, v from the last 10 V, weighted by age;  W <- (1 - lr wd) W - lr m / (sqrt(v) + eps)

No moment is stored. All tensors are treated alike, in blocks of 4096 elements;
a step moves at most a tenth of the elements. Weights and gradients may have any
dtype and live anywhere.

Bytes for d elements, b = ceil(d / 4096): 2048 b + 4 b 4096 / bucket + 4 window ceil(4096 density) b + 4,
which is 0.9 d for the defaults.
"""

from __future__ import annotations

from lowmem.optim.rules.microadam import MicroAdam
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2405.15593")
def microadam(*, window: int = 10, density: float = 0.01, bucket: int = 4096) -> Strategy:
    """Adam from a window of sparse gradients with 4-bit error feedback.

    Args:
        window: Sparse gradients that are kept.
        density: Share of a block of 4096 elements that a sparse gradient holds.
        bucket: Elements that share one 4-bit range; 64 is finer and costs 0.06 bytes per parameter.
    """
    rule = MicroAdam(window, density, bucket)
    return Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
