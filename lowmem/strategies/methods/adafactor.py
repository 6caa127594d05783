"""Adafactor (arXiv 1804.04235): Adam's denominator from row and column means, no momentum.

    V = r c' / mean(r),  U = G / sqrt(V) clipped to rms 1
    W <- (1 - alpha wd) W - alpha U,   alpha = lr

The defaults are those of `optim="adafactor"` in transformers: lr is the step.
With `scale_parameter` steps are in units of the weight's rms, with
`relative_step` they shrink as 1 / sqrt(t) once that is below lr. What
transformers calls relative_step=True, lr=None is lr=0.01 here, and its
warmup_init=True is warmup=10000. Matrices are the first dimension by the rest.

Bytes for an (m, n) weight: 4 (m + n) + 4, and the momentum's with beta1 (4 m n in
fp32); for a vector of d elements 4 d + 4 in fp32. betas and eps are not used.
"""

from __future__ import annotations

from typing import Literal

from lowmem.optim.rules.adafactor import Adafactor
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from lowmem.strategies.registry import register


@register(paper="1804.04235")
def adafactor(
    *,
    scale_parameter: bool = False,
    relative_step: bool = False,
    warmup: int = 0,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float = 0.0,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    states: Literal["fp32", "bf16", "int8", "int4", "companded8"] = "fp32",
) -> Strategy:
    """Second moments from row and column means, no first moment.

    Args:
        scale_parameter: Multiply lr by the rms of the weight, as for training from scratch.
        relative_step: Let steps be at most 1 / sqrt(t).
        warmup: Steps until a relative step reaches lr; 0 for none.
        clip_threshold: Largest rms of a step, in units of lr.
        decay_rate: Exponent of t in the second moment's average.
        beta1: Share of the old step in an average of steps; 0 holds none.
        eps1: Added to squared gradients.
        eps2: Least rms of a weight that scale_parameter counts.
        states: Precision of what is held in full, the average of steps and second moments of vectors.
    """
    rule = Adafactor.of(
        states,
        beta1=beta1,
        decay_rate=decay_rate,
        eps1=eps1,
        clip_threshold=clip_threshold,
        scale_parameter=scale_parameter,
        eps2=eps2,
        relative_step=relative_step,
        warmup=warmup,
    )
    return Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
