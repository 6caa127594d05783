"""APOLLO (arXiv 2412.05270): the gradient itself, each channel as long as Adam would make it.

    R = P'G with P drawn from a normal distribution,  N = Adam(R),  phi_j = |N_j| / |R_j|
    W <- (1 - lr wd) W - lr scale G phi,  growing by 1 % a step at most

The sketch P is never held, and drawn again from its name in every step. Embeddings, head,
norms and biases take Adam.

Bytes for an (m, n) weight, l = max(m, n), fp32 states: 8 r l + 8.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.dense import Frame
from lowmem.optim.projectors.random import Gaussian
from lowmem.optim.residuals import ScaledGradient
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2412.05270")
def apollo(
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    limit: float = 1.01,
    per: Literal["channel", "tensor"] = "channel",
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """The gradient with channels scaled by Adam's statistics of a random sketch.

    Args:
        rank: Rows of the sketch; 1 with per=tensor and scale=128 is APOLLO-Mini.
        update_proj_gap: Steps with the same sketch.
        scale: Factor of the learning rate.
        limit: How much longer than before a step may be; 0 for no limit.
        per: One factor for each channel, or one for the tensor.
        states: Precision of the moments, also of the tensors that are not projected.
    """
    rest = ScaledGradient(scale, limit, per)
    inside = Subspace(Gaussian(Frame(rank), update_proj_gap), coded(Adam(), states), rest)
    return Strategy(rules={"matrix": inside, **outside(states)}, source=Backprop())
