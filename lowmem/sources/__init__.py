"""Where gradients come from: backpropagation, or values of the loss alone."""

from lowmem.sources.backprop import Backprop
from lowmem.sources.spsa import SPSA

__all__ = ["SPSA", "Backprop"]
