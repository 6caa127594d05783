"""Where gradients come from: backpropagation, values of the loss alone, or its slopes forwards."""

from lowmem.sources.backprop import Backprop
from lowmem.sources.estimators import Curved, OneSided, TwoSided
from lowmem.sources.forward import ForwardGradient
from lowmem.sources.mixed import Mixed
from lowmem.sources.spsa import SPSA
from lowmem.sources.structures import Free, LowRank, Scales, Sparse

__all__ = [
    "SPSA",
    "Backprop",
    "Curved",
    "ForwardGradient",
    "Free",
    "LowRank",
    "Mixed",
    "OneSided",
    "Scales",
    "Sparse",
    "TwoSided",
]
