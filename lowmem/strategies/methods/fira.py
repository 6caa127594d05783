"""Fira (arXiv 2410.01623): GaLore, and the rest of the gradient scaled like the part that is seen.

    R = P'G,  N = Adam(R),  phi_j = |N_j| / |R_j|
    W <- (1 - lr wd) W - lr (scale P N + phi (G - P R)),  growing by 1 % a step at most

Updates are of full rank at the memory of a projection. Embeddings, head, norms and biases take Adam.

Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 8.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.dense import Frame, Orthonormal
from lowmem.optim.residuals import ScaledRest
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2410.01623")
def fira(
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    limit: float = 1.01,
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Adam in the leading subspace, and the rest scaled channel by channel.

    Args:
        rank: Directions of the subspace; clipped to the short side.
        update_proj_gap: Steps between refreshes of the subspace.
        scale: Factor of the learning rate inside the subspace.
        limit: How much longer than before the step of the rest may be; 0 for no limit.
        states: Precision of the moments, also of the tensors that are not projected.
    """
    basis = Orthonormal(Frame(rank), update_proj_gap=update_proj_gap)
    inside = Subspace(basis, coded(Adam(), states), ScaledRest(limit=limit), scale=scale)
    return Strategy(rules={"matrix": inside, **outside(states)}, source=Backprop())
