"""What becomes of the part of a gradient that is not seen."""

from __future__ import annotations

from typing import Annotated

from lowmem.optim.residuals import Drop, Residual, Stateless
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part

Scale = Annotated[float, Limits(least=0.0)]


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
