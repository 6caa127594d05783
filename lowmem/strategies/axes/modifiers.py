"""What is done to gradient and step, around any rule.

A modifier is a `Modifier`, or a function that makes an element-wise rule of one: those hold a moment
of their own, and stand next to the rule wherever they are named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Literal

from lowmem.optim.elementwise import Elementwise
from lowmem.optim.modifiers.around import Lookahead, XGrad
from lowmem.optim.modifiers.masks import AlphaMask, Cautious, Grams
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.modifiers.norms import Limit, TrustRatio
from lowmem.optim.modifiers.spikes import MomentumReset, SpikeClip
from lowmem.strategies.options import Gap, Limits
from lowmem.strategies.parts import part


@part("modifier")
def cautious(*, rescale: Literal["mean", "norm"] = "mean") -> Modifier:
    """No step where it goes against its gradient.

    Args:
        rescale: Lengthen what is left by the share of elements, or to the norm of the whole.
    """
    return Cautious(rescale)


@part("modifier")
def grams() -> Modifier:
    """The size of the step, the sign of its gradient."""
    return Grams()


@part("modifier")
def limit(*, growth: Annotated[float, Limits(least=1.0)] = 1.01) -> Modifier:
    """Steps whose norm grows by no more than a factor.

    Args:
        growth: The factor.
    """
    return Limit(growth)


@part("modifier")
def trust_ratio() -> Modifier:
    """Steps as long as their weight, times lr."""
    return TrustRatio()


@part("modifier")
def spike_clip(
    *, threshold: Annotated[float, Limits(above=0.0)] = 5000.0, guard: Annotated[int, Limits(least=1)] = 20
) -> Modifier:
    """Elements of the gradient far beyond their second moment are cut back to it.

    Args:
        threshold: How many times its second moment the square of an element may be.
        guard: Steps at the start, and after a reset of the moments, in which nothing is cut.
    """
    return SpikeClip(threshold, guard)


@part("modifier")
def alpha_mask() -> Modifier:
    """No step where the gradient goes against the momentum so far; what is left is as long as the whole."""
    return AlphaMask()


@part("modifier")
def momentum_reset(*, gap: Gap = 500, warmup: Annotated[int, Limits(least=0, small=2)] = 150) -> Modifier:
    """The moments are forgotten now and then, and steps are short after it.

    Args:
        gap: Steps until the moments are forgotten.
        warmup: Steps until they are as long as before; 0 for at once.
    """
    return MomentumReset(gap, warmup)


@part("modifier")
def lookahead(
    *,
    every: Annotated[int, Limits(least=1)] = 5,
    share: Annotated[float, Limits(above=0.0, most=1.0)] = 0.5,
) -> Callable[[Elementwise], Elementwise]:
    """Lookahead: every few steps, back part of the way.

    Args:
        every: Steps between looks back.
        share: Of the way that is kept.
    """
    return functools.partial(Lookahead, every=every, share=share)


@part("modifier")
def xgrad(*, ahead: Annotated[int, Limits(least=1)] = 1) -> Callable[[Elementwise], Elementwise]:
    """XGrad: gradients are taken where the weight will be.

    Args:
        ahead: Steps by which the weight is ahead.
    """
    return functools.partial(XGrad, ahead=ahead)
