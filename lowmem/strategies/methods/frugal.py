"""FRUGAL (arXiv 2411.07837): Adam on a part of the gradient, signSGD on the rest.

    R = down(G),  N = Adam(R)
    W <- (1 - lr wd) W - lr (up(N) + residual_scale sign(G - up(R)))

The part is a share `density` of the columns, of single elements, of whole
matrices, or of the singular directions. It changes every `update_proj_gap` steps,
and the moments start afresh. Updates stay full rank. Density 1 is AdamW within a
window, density 0 is signSGD without any state. Embeddings, head, norms and
biases take Adam.

Bytes for an (m, n) weight, fp32 states: columns, k = floor(density n): 8 m k + 4 k + 4;
randk, g = ceil(m n / 256) groups of k = round(256 density): 9 g k + 4;
svd, r = round(density s): 4 s r + 8 r l + 4; blocks: 8 m n + 4 while active, else 0.
"""

from __future__ import annotations

from typing import Literal

from lowmem.errors import UserError
from lowmem.optim.contract import Projector
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.coordinate import Columns, Elements
from lowmem.optim.projectors.dense import Frame, Orthonormal, svd
from lowmem.optim.residuals import residual as residual_of
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.rules.sgd import SGD
from lowmem.optim.schedules import RandomBlocks
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2411.07837")
def frugal(
    *,
    density: float = 0.25,
    split: Literal["columns", "randk", "svd", "blocks"] = "columns",
    update_proj_gap: int = 200,
    residual: Literal["sign", "sgd"] = "sign",
    residual_scale: float = 1.0,
    on_refresh: Literal["reset", "keep"] = "reset",
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Adam on a share of the gradient that changes over time, signSGD on the rest.

    Args:
        density: Share of the matrices that has moments; 0 is signSGD.
        split: What the share consists of.
        update_proj_gap: Steps until another share has its turn.
        residual: What the rest steps by, its sign or itself.
        residual_scale: Factor of the learning rate for the rest, at least 0.
        on_refresh: Moments of a new share start afresh, or stay where they were.
        states: Precision of the moments, also of the tensors that are not split.
    """
    if not 0.0 <= density <= 1.0:
        raise UserError(f"frugal: density is a share between 0 and 1, got {density}")
    if residual_scale < 0.0:
        raise UserError(f"frugal: residual_scale must be at least 0, got {residual_scale}")
    if split == "blocks" and on_refresh == "keep":
        raise UserError(
            "frugal: split='blocks' drops the moments of a block that is put aside; take on_refresh='reset'"
        )
    adam, rest, rules = (
        coded(Adam(), states),
        coded(SGD(residual_scale, sign=residual == "sign")),
        outside(states),
    )
    if density == 0.0:
        return Strategy(rules={**rules, "matrix": rest}, source=Backprop())
    if split == "blocks":
        schedule = RandomBlocks(density, update_proj_gap)
        return Strategy(
            rules={**rules, "matrix": adam, "inactive": rest}, source=Backprop(), schedule=schedule
        )
    left = residual_of(residual, residual_scale)
    inside = Subspace(_projector(split, density, update_proj_gap), adam, left, on_refresh)
    return Strategy(rules={**rules, "matrix": inside}, source=Backprop())


def _projector(split: str, density: float, gap: int) -> Projector:
    if split == "columns":
        return Columns(density, gap)
    if split == "randk":
        return Elements(density, gap)
    return Orthonormal(Frame(density), svd, gap)
