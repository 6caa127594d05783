"""LOZO (arXiv 2410.07698): directions of low rank.

    Z = U V' / sqrt(rank),    c = (L(W + eps Z) - L(W - eps Z)) / (2 eps),    W <- (1 - lr wd) W - lr c Z

U is new in every step, V stays for `update_gap` of them, so that the steps of a window
lie in one subspace. Z has unit variance: eps and lr mean what they mean for MeZO (the
paper displaces by U V' itself: its eps is ours / sqrt(rank), its lr ours, with 1 / rank
in the estimate; its code leaves that out). Vectors have free directions.

Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights once
more and 4 n rank bytes of V.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import SPSA, LowRank
from lowmem.strategies.registry import register


@register(paper="2410.07698")
def lozo(
    *,
    eps_perturb: float = 1e-3,
    noise: Literal["gaussian", "rademacher"] = "gaussian",
    queries: int = 1,
    rank: int = 2,
    update_gap: int = 50,
) -> Strategy:
    """Zeroth-order steps along low-rank directions that share a side for a while.

    Args:
        eps_perturb: Radius of the perturbation for each unit of noise.
        noise: What U and V are made of: normal numbers as in the paper, or signs.
        queries: Directions averaged in each step, two forward passes each.
        rank: Columns of U and V.
        update_gap: Steps for which V stays.
    """
    rule = coded(SGD())
    source = SPSA(eps_perturb, noise, queries, structure=LowRank(rank, update_gap))
    return Strategy(rules={"matrix": rule, "other": rule}, source=source)
