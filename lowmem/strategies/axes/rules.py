"""How a step is made of a gradient.

A rule that a paper writes element by element is given as it is; the composition holds its moments
as `states` says. One that needs the whole tensor takes `states` itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import Elementwise
from lowmem.optim.rules.compact.adafactor import Adafactor
from lowmem.optim.rules.compact.microadam import MicroAdam
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD, AverageGradient
from lowmem.optim.rules.normalised.muon import Muon
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part


@part("rule")
def adam() -> Elementwise:
    """Adam: two moments with bias correction."""
    return Adam()


@part("rule")
def sgd() -> Elementwise:
    """The gradient itself; no state."""
    return SGD()


@part("rule")
def signsgd() -> Elementwise:
    """The sign of the gradient; no state."""
    return SGD(sign=True)


@part("rule")
def average(*, bias_correction: bool = True) -> Elementwise:
    """Momentum: an average of gradients, without a second moment.

    Args:
        bias_correction: Divide by what the average lacks in the first steps.
    """
    return AverageGradient(bias_correction)


@part("rule")
def adafactor(
    *,
    states: str,
    inside: bool,
    scale_parameter: bool = False,
    relative_step: bool = False,
    warmup: Annotated[int, Limits(least=0)] = 0,
    clip_threshold: Annotated[float, Limits(above=0.0)] = 1.0,
    decay_rate: Annotated[float, Limits(below=0.0)] = -0.8,
    beta1: Annotated[float, Limits(least=0.0, below=1.0)] = 0.0,
    eps1: Annotated[float, Limits(least=0.0)] = 1e-30,
    eps2: Annotated[float, Limits(least=0.0)] = 1e-3,
) -> AnyRule:
    """Adafactor: a second moment from row and column means.

    Args:
        scale_parameter: Multiply lr by the rms of the weight, as for training from scratch.
        relative_step: Let steps be at most 1 / sqrt(t).
        warmup: Steps until a relative step reaches lr; 0 for none.
        clip_threshold: Largest rms of a step, in units of lr.
        decay_rate: Exponent of t in the second moment's average.
        beta1: Share of the old step in an average of steps; 0 holds none.
        eps1: Added to squared gradients.
        eps2: Least rms of a weight that scale_parameter counts.
    """
    return Adafactor.of(
        states,
        scale_parameter=scale_parameter,
        relative_step=relative_step,
        warmup=warmup,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        beta1=beta1,
        eps1=eps1,
        eps2=eps2,
        floor=1e-8 if inside else 0.0,  # a subspace holds directions that the gradient does not have
    )


@part("rule")
def microadam(
    *,
    window: Annotated[int, Limits(least=1, small=3)] = 10,
    density: Annotated[float, Limits(above=0.0, most=1.0)] = 0.01,
    bucket: Annotated[int, Limits(least=2)] = 4096,
) -> AnyRule:
    """Adam from a window of sparse gradients, with the rest owed in 4 bits.

    Args:
        window: Sparse gradients that are kept.
        density: Share of a block of 4096 elements that a sparse gradient holds.
        bucket: Elements that share one 4-bit range; 64 is finer and costs 0.06 bytes per parameter.
    """
    return MicroAdam(window, density, bucket)


@part("rule")
def muon(
    *,
    states: str,
    momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.95,
    nesterov: bool = True,
    iterations: Annotated[int, Limits(least=0)] = 5,
    scaling: Literal["rms", "aspect"] = "rms",
    codes: Literal["dynamic", "linear"] = "dynamic",
    products: Literal["fp32", "bf16"] = "fp32",
) -> AnyRule:
    """Muon: momentum whose singular values are made equal.

    Args:
        momentum: Share of the old momentum.
        nesterov: Look ahead by the fresh gradient.
        iterations: Of Newton and Schulz; 0 for the exact factor, by eigenvectors.
        scaling: Steps as long as AdamW's, or longer for tall matrices alone.
        codes: Map of 8-bit codes; linear ones have a scale for 2048 elements.
        products: Precision of those of Newton and Schulz; bf16 is much faster on a card.
    """
    return Muon.of(
        states, momentum=momentum, nesterov=nesterov, iterations=iterations, scaling=scaling, codes=codes,
        products=products,
    )  # fmt: skip
