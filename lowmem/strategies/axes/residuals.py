"""What becomes of the part of a gradient that is not seen."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.contract import Residual
from lowmem.optim.residuals.feedback import Feedback
from lowmem.optim.residuals.rest import Drop, ScaledGradient, ScaledRest, Stateless, SubsetNormed
from lowmem.strategies.options import Limits, States
from lowmem.strategies.parts import part

Scale = Annotated[float, Limits(least=0.0)]
Positive = Annotated[float, Limits(above=0.0)]
Limit = Annotated[float, Limits(least=0.0)]


@part("residual")
def drop() -> Residual:
    """It is forgotten."""
    return Drop()


@part("residual")
def sign(*, scale: Scale = 1.0) -> Residual:
    """A step by its sign.

    Args:
        scale: Factor of the learning rate for the rest.
    """
    return Stateless(sign=True, scale=scale)


@part("residual")
def sgd(*, scale: Scale = 1.0) -> Residual:
    """A step by itself.

    Args:
        scale: Factor of the learning rate for the rest.
    """
    return Stateless(sign=False, scale=scale)


def lengthened(
    *, scale: Positive = 1.0, limit: Limit = 1.01, per: Literal["channel", "tensor"] = "channel"
) -> tuple[float, float, str]:
    """How a step goes by what the rule makes of what is seen.

    Args:
        scale: Factor of the learning rate for it.
        limit: How much longer than the step before a step may be; 0 for no limit.
        per: One factor for each channel, or one for the tensor.
    """
    return scale, limit, per


@part("residual", first=lengthened)
def scaled_rest(scale: float, limit: float, per: str) -> Residual:
    """A step by it, each channel as much longer as the rule makes what is seen."""
    return ScaledRest(scale, limit, per)


@part("residual", first=lengthened)
def scaled_gradient(scale: float, limit: float, per: str) -> Residual:
    """A step by the whole gradient, scaled like that; what is seen serves statistics alone."""
    return ScaledGradient(scale, limit, per)


@part("residual")
def subset_norm() -> Residual:
    """A step by it and by what is seen, over norms of rows or columns: the channels of the projection."""
    return SubsetNormed()


@part("residual")
def feedback(*, error_states: States = "int8", momentum: bool = False) -> Residual:
    """It is owed: added to the next gradient.

    Args:
        error_states: Precision of what is owed.
        momentum: Owe what a change of basis takes from the momentum too.
    """
    return Feedback.of(error_states, momentum=momentum)
