"""DCT-AdamW (arXiv 2505.17967): Adam on the cosines of which the gradient has most.

    S = G C',  R = S[:, index] with the r largest columns,  W <- (1 - lr wd) W - lr Adam(R) C[index]

C is the orthonormal DCT-II of the side, the same for all tensors that have it. A
cosine that stays keeps its moments, a new one starts with age 0. Embeddings, head, norms and
biases take Adam.

Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 8 r l + 8 r; and 4 s^2
once for each s.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.dct import DCT
from lowmem.optim.projectors.dense import Frame
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2505.17967")
def dct(
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    on_refresh: Literal["rotate", "keep", "reset"] = "rotate",
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Adam on chosen columns of one cosine basis.

    Args:
        rank: Cosines that are chosen; clipped to the short side.
        update_proj_gap: Steps between choices.
        scale: Factor of the learning rate.
        on_refresh: Moments follow their cosine, stay in their place, or start afresh.
        states: Precision of the moments, also of the tensors that are not projected.
    """
    basis = DCT(Frame(rank), update_proj_gap)
    inside = Subspace(basis, coded(Adam(), states), on_refresh=on_refresh, scale=scale)
    return Strategy(rules={"matrix": inside, **outside(states)}, source=Backprop())
