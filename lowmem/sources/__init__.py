"""Where gradients come from: backpropagation, or values of the loss alone."""

from lowmem.sources.backprop import Backprop
from lowmem.sources.estimators import Curved, OneSided, TwoSided
from lowmem.sources.mixed import Mixed
from lowmem.sources.spsa import SPSA
from lowmem.sources.structures import Free, LowRank, Scales, Sparse

__all__ = [
    "SPSA",
    "Backprop",
    "Curved",
    "Free",
    "LowRank",
    "Mixed",
    "OneSided",
    "Scales",
    "Sparse",
    "TwoSided",
]
