"""Online Subspace Descent (arXiv 2408.12857): GaLore whose basis follows every gradient.

    R = P'G,  W <- (1 - lr wd) W - lr scale P Adam(R)
    P <- P - rate lr d/dP (|P P'A - A|^2 + penalty |P'P - I|^2),  A = G / |G|

No factorization after the first step. Embeddings, head, norms and biases take Adam.

Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 4.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.dense import Frame
from lowmem.optim.projectors.online import Online
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2408.12857")
def online_subspace(
    *,
    rank: int = 128,
    rate: float = 5.0,
    penalty: float = 0.1,
    scale: float = 0.25,
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Adam in a subspace that descends on what it misses of each gradient.

    Args:
        rank: Directions of the subspace; clipped to the short side.
        rate: Of the basis, in units of the learning rate.
        penalty: Weight of a basis that is not orthonormal.
        scale: Factor of the learning rate inside the subspace.
        states: Precision of the moments, also of the tensors that are not projected.
    """
    inside = Subspace(Online(Frame(rank), rate, penalty), coded(Adam(), states), scale=scale)
    return Strategy(rules={"matrix": inside, **outside(states)}, source=Backprop())
