"""AdamW with quantized moments (arXiv 2110.02861, 2309.01507, 2602.23349).

The arithmetic is AdamW's, in fp32; both moments are decoded before it and
encoded after it. Tensors below 4096 elements keep fp32 moments.

Bytes for an (m, n) weight, d = m n: 2 d + 8 ceil(d / 256) + 4 (int8),
2 d + 4 ceil(d / 32) + 4 (companded8), 2 ceil(d / 2) + 8 ceil(d / 128) + 4 (int4).
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.elementwise import coded
from lowmem.optim.rules.adam import Adam, outside
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="2110.02861")
def adamw_8bit(*, states: Literal["int8", "companded8", "int4"] = "int8") -> Strategy:
    """AdamW with moments of 8 or 4 bits.

    Args:
        states: int8 is the dynamic map, companded8 a curve without a table (faster), int4 half of it.
    """
    return Strategy(rules={"matrix": coded(Adam(), states), **outside(states)}, source=Backprop())
