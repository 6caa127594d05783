"""Rules that a paper writes element by element: any projector sees for them, any precision holds them."""

from __future__ import annotations

from typing import Annotated

from lowmem.optim.elementwise import Elementwise
from lowmem.optim.rules.elementwise.adam_kin import AdaBelief, AMSGrad, LaProp, NAdam
from lowmem.optim.rules.elementwise.long_memory import Adan, AdEMAMix, DiffGrad
from lowmem.optim.rules.elementwise.paths import INNAprop, ScheduleFree
from lowmem.optim.rules.elementwise.sign import Ano, Lion
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part


@part("rule")
def lion() -> Elementwise:
    """Lion: the sign of gradient and momentum mixed; one moment."""
    return Lion()


@part("rule")
def ano() -> Elementwise:
    """Ano: the sign of the momentum, the size of the gradient."""
    return Ano()


@part("rule")
def adan(*, beta_diff: Annotated[float, Limits(least=0.0, below=1.0)] = 0.92) -> Elementwise:
    """Adan: Nesterov momentum from differences of gradients.

    Args:
        beta_diff: Share of the old average of differences.
    """
    return Adan(beta_diff)


@part("rule")
def ademamix(
    *,
    alpha: Annotated[float, Limits(least=0.0)] = 2.0,
    beta3: Annotated[float, Limits(least=0.0, below=1.0)] = 0.9999,
    slow_warmup: Annotated[int, Limits(least=0)] = 0,
) -> Elementwise:
    """AdEMAMix: Adam with a second, slow average.

    Args:
        alpha: Share of the slow average in the step.
        beta3: Share of the old slow average.
        slow_warmup: Steps until alpha and beta3 are reached; 0 for at once.
    """
    return AdEMAMix(alpha, beta3, slow_warmup)


@part("rule")
def diffgrad() -> Elementwise:
    """DiffGrad: Adam slowed down where the gradient hardly changes."""
    return DiffGrad()


@part("rule")
def amsgrad() -> Elementwise:
    """AMSGrad: Adam over the largest second moment so far."""
    return AMSGrad()


@part("rule")
def adabelief(*, rectify: bool = False) -> Elementwise:
    """AdaBelief: Adam over how far gradients lie from their average.

    Args:
        rectify: Take plain momentum until the variance is known.
    """
    return AdaBelief(rectify)


@part("rule")
def laprop() -> Elementwise:
    """LaProp: an average of normalised gradients."""
    return LaProp()


@part("rule")
def nadam(*, momentum_decay: Annotated[float, Limits(least=0.0)] = 0.004) -> Elementwise:
    """NAdam: Adam that looks ahead along its momentum.

    Args:
        momentum_decay: How fast the momentum rises to beta1.
    """
    return NAdam(momentum_decay)


@part("rule")
def innaprop(
    *,
    alpha: Annotated[float, Limits(least=0.0)] = 0.1,
    beta: Annotated[float, Limits(above=0.0)] = 0.9,
) -> Elementwise:
    """INNAprop: a heavy ball whose friction looks at the gradient's change, over RMSprop.

    Args:
        alpha: Viscous friction.
        beta: Friction by the change of the gradient.
    """
    return INNAprop(alpha, beta)


@part("rule")
def schedule_free(*, warmup: Annotated[int, Limits(least=0)] = 0) -> Elementwise:
    """Schedule-free Adam: iterates are averaged instead of letting lr fall.

    Args:
        warmup: Steps until steps have their full length.
    """
    return ScheduleFree(warmup)
