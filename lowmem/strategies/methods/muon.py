"""Muon (arXiv 2502.16982): momentum whose singular values are made equal.

    M <- M + (1 - momentum)(G - M),  X = orthogonal factor of M by five steps of Newton and Schulz
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) X

One moment instead of two. Embeddings, head, norms and biases take Adam.

Bytes for an (m, n) weight: 4 m n with fp32 states, m n + 4 ceil(m n / 256) with int8.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.rules.adam import outside
from lowmem.optim.rules.muon import Muon
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2502.16982")
def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    scaling: Literal["rms", "aspect"] = "rms",
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Momentum with equal singular values.

    Args:
        momentum: Share of the old momentum.
        nesterov: Look ahead by the fresh gradient.
        iterations: Of Newton and Schulz.
        scaling: Steps as long as AdamW's, or longer for tall matrices alone.
        states: Precision of the momentum, also of the moments of other tensors.
    """
    rule = Muon.of(states, momentum=momentum, nesterov=nesterov, iterations=iterations, scaling=scaling)
    return Strategy(rules={"matrix": rule, **outside(states)}, source=Backprop())
