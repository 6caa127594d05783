"""AdamW (arXiv 1711.05101), the yardstick.

    W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps)

Bytes for an (m, n) weight: 8 m n + 4 with fp32 moments, 4 m n + 4 with bf16 ones.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.adam import Adam
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="1711.05101")
def adamw(*, states: Literal["fp32", "bf16"] = "fp32") -> Strategy:
    """AdamW with plain moments.

    Args:
        states: Precision of both moments; bf16 is rounded at random.
    """
    rule = coded(Adam(), states)
    return Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
