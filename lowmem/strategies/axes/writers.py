"""How a new weight of 16 bits is stored; weights of 32 bits are written to nearest, whatever is chosen."""

from __future__ import annotations

from lowmem.optim.writers import Eco, Halves, Kahan, Nearest, Stochastic, Writer
from lowmem.strategies.parts import part


@part("writer")
def stochastic() -> Writer:
    """Rounded at random, so that small steps are taken with the right mean."""
    return Stochastic()


@part("writer")
def nearest() -> Writer:
    """Rounded to the nearest number: small steps are lost."""
    return Nearest()


@part("writer")
def kahan() -> Writer:
    """Rounded to nearest, and what is lost is held in 16 bits more."""
    return Kahan()


@part("writer")
def split() -> Writer:
    """A bf16 weight and 8 bits more of it."""
    return Halves()


@part("writer")
def eco() -> Writer:
    """Of int8 weights: the error of rounding is carried along in 8 bits; 16-bit ones as stochastic."""
    return Eco()
