"""GaLore (arXiv 2403.03507): Adam where the gradient's leading subspace is seen.

    R = P'G,  N = inner(R),  W <- (1 - lr wd) W - lr scale P N

P spans the leading r directions of the gradient, found anew every
`update_proj_gap` steps (staggered over the parameters). The inner rule is Adam or
Adafactor; embeddings, head, norms and biases take it plain.

Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states:
4 s r (basis) + 8 r l (moments) + 4; with Adafactor 4 s r + 4 (r + l) + 4.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.dense import Frame, Orthonormal, power_iteration, svd
from lowmem.optim.rules.adafactor import Adafactor
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2403.03507")
def galore(
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std",
    projector: Literal["power", "svd"] = "power",
    on_refresh: Literal["keep", "reset", "rotate"] = "keep",
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
    inner: Literal["adam", "adafactor"] = "adam",
) -> Strategy:
    """Adam in the leading subspace of the gradient.

    Args:
        rank: Directions of the subspace; clipped to the short side.
        update_proj_gap: Steps between refreshes of the subspace.
        scale: Factor of the learning rate inside the subspace.
        proj_type: Side that is projected; std is the short one.
        projector: Warm-started power iteration, or an exact SVD.
        on_refresh: What becomes of the moments at a refresh.
        states: Precision of the moments, also of the tensors that are not projected.
        inner: The rule inside; adafactor holds row and column means there, and no first moment.
    """
    find = svd if projector == "svd" else power_iteration
    basis = Orthonormal(Frame(rank, proj_type), find, update_proj_gap)
    rule = Adafactor.of(states, floor=1e-8) if inner == "adafactor" else coded(Adam(), states)
    others = outside(states) if inner == "adam" else {"other": rule}
    inside = Subspace(basis, rule, on_refresh=on_refresh, scale=scale)
    return Strategy(rules={"matrix": inside, **others}, source=Backprop())
