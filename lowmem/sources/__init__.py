"""Where gradients come from: backpropagation, or values of the loss alone."""

from lowmem.sources.backprop import Backprop

__all__ = ["Backprop"]
