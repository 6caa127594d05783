"""Rules that need the whole tensor: its norms, or the sums of its rows and columns."""

from __future__ import annotations

from typing import Annotated, Literal

from lowmem.optim.contract import AnyRule
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.rules.compact.adam_mini import AdamMini
from lowmem.optim.rules.compact.adam_rankone import AdamRankOne
from lowmem.optim.rules.compact.came import CAME
from lowmem.optim.rules.compact.mlorc import MLorc
from lowmem.optim.rules.compact.sm3 import SM3
from lowmem.optim.rules.compact.smmf import SMMF
from lowmem.optim.rules.compact.subsets import SubsetNorm
from lowmem.optim.rules.measured.layerwise import NovoGrad, SGDSaI, StableSPAM
from lowmem.optim.rules.normalised.orthonormal import AdaMuon, Dion
from lowmem.optim.rules.normalised.rows import AuON, Scaled, SinkGD
from lowmem.optim.rules.normalised.whitened import SWAN
from lowmem.strategies.options import Limits, Size, SubsetSize
from lowmem.strategies.parts import part


@part("rule")
def sgd_sai(*, states: str, momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.9) -> AnyRule:
    """SGD-SaI: momentum, scaled by the signal-to-noise ratio of the first gradient.

    Args:
        momentum: Share of the old momentum.
    """
    return SGDSaI.of(states, momentum=momentum)


@part("rule")
def novograd(*, states: str, averaging: bool = False) -> AnyRule:
    """NovoGrad: momentum of gradients over an average norm of their tensor.

    Args:
        averaging: Make the momentum an average instead of a sum.
    """
    return NovoGrad.of(states, averaging=averaging)


Share = Annotated[float, Limits(least=0.0, below=1.0)]


@part("rule")
def stable_spam(*, states: str, gamma1: Share = 0.7, gamma2: Share = 0.9, theta: Share = 0.999) -> AnyRule:
    """Adam on gradients that are clipped and normalised by their own history.

    Args:
        gamma1: Share of the old average of the gradient's norm.
        gamma2: Share of the old average of its square.
        theta: Share of the old average of the largest element.
    """
    return StableSPAM.of(states, gamma1=gamma1, gamma2=gamma2, theta=theta)


@part("rule")
def smmf(
    *,
    decay_rate: Annotated[float, Limits(below=0.0)] = -0.8,
    growth_rate: Annotated[float, Limits(above=0.0, most=1.0)] = 0.999,
) -> AnyRule:
    """SMMF: both moments as outer products of two vectors, and one bit for a sign.

    Args:
        decay_rate: Exponent of t in the average of squares.
        growth_rate: Factor of beta1 for each step; 1 keeps the momentum.
    """
    return SMMF(decay_rate, growth_rate)


@part("rule")
def came(
    *,
    states: str,
    inside: bool,
    beta3: Annotated[float, Limits(least=0.0, below=1.0)] = 0.9999,
    clip_threshold: Annotated[float, Limits(above=0.0)] = 1.0,
    eps1: Annotated[float, Limits(least=0.0)] = 1e-30,
    eps2: Annotated[float, Limits(least=0.0)] = 1e-16,
) -> AnyRule:
    """CAME: Adafactor's step, averaged, and shorter where steps disagree.

    Args:
        beta3: Share of the old average of how far steps lie from their average.
        clip_threshold: Largest rms of a step before it is averaged.
        eps1: Added to squared gradients.
        eps2: Added to squared distances.
    """
    floor = 1e-8 if inside else 0.0
    return CAME.of(states, beta3=beta3, clip_threshold=clip_threshold, eps1=eps1, eps2=eps2, floor=floor)


@part("rule")
def sm3(
    *, states: str, inside: bool, momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.0
) -> AnyRule:
    """SM3: Adagrad with a number for each row and column.

    Args:
        momentum: Share of the old average of steps; 0 holds none.
    """
    return SM3.of(states, momentum=momentum, floor=1e-8 if inside else 0.0)


@part("rule")
def adam_mini(*, states: str) -> AnyRule:
    """Adam-mini: Adam with one second moment for each row, or head."""
    return AdamMini.of(states)


@part("rule")
def adam_rank1(*, states: str) -> AnyRule:
    """Adam with a second moment of 4 bits under scales of rows and columns."""
    return AdamRankOne.of(states)


@part("rule")
def sinkgd(
    *,
    iterations: Annotated[int, Limits(least=1)] = 5,
    alpha: Annotated[float, Limits(above=0.0)] = 0.05,
) -> AnyRule:
    """SinkGD: the gradient with rows and columns of one size; no state.

    Args:
        iterations: Of Sinkhorn.
        alpha: Rms of a step, in units of lr.
    """
    return SinkGD(iterations, alpha)


@part("rule")
def ada_muon(
    *,
    states: str,
    momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.95,
    nesterov: bool = True,
    iterations: Annotated[int, Limits(least=0)] = 5,
    sign: bool = True,
    products: Literal["fp32", "bf16"] = "fp32",
) -> AnyRule:
    """AdaMuon: Muon's step over the root of the average of its squares.

    Args:
        momentum: Share of the old momentum.
        nesterov: Look ahead by the fresh gradient.
        iterations: Of Newton and Schulz; 0 for the exact factor, by eigenvectors.
        sign: Make the signs of the momentum orthogonal, as in the paper, instead of the momentum.
        products: Precision of those of Newton and Schulz; bf16 is much faster on a card.
    """
    return AdaMuon.of(
        states, momentum=momentum, nesterov=nesterov, iterations=iterations, sign=sign, products=products
    )


@part("rule")
def auon(
    *,
    states: str,
    momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.95,
    gamma: Annotated[float, Limits(above=0.0)] = 1.5,
    scaling: Literal["aspect", "rms", "released"] = "aspect",
) -> AnyRule:
    """AuON: the momentum over its norm.

    Args:
        momentum: Share of the old momentum.
        gamma: How much large elements shorten a step.
        scaling: Norm 1 or more, steps as long as AdamW's, or the published code's.
    """
    return AuON.of(states, momentum=momentum, gamma=gamma, scaling=scaling)


@part("rule")
def dion(
    *,
    states: str,
    rank: Size = 128,
    momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.95,
) -> AnyRule:
    """Dion: the orthogonal factor of a low-rank part of the momentum.

    Args:
        rank: Directions that a step has, or their share of the short side; clipped to that side.
        momentum: Share of what was seen that stays in the momentum.
    """
    return Dion.of(states, rank=rank, momentum=momentum)


@part("rule")
def swan(*, iterations: Annotated[int, Limits(least=1)] = 10) -> AnyRule:
    """SWAN: the gradient with standardised rows and equal singular values; no state.

    Args:
        iterations: Of Newton and Schulz.
    """
    return SWAN(iterations)


@part("rule")
def row_norm() -> AnyRule:
    """The gradient with each row over its rms; no state."""
    return Scaled()


@part("rule")
def column_norm() -> AnyRule:
    """The gradient with each column over its rms; no state."""
    return Scaled(columns=True)


@part("rule")
def row_norm_momentum(
    *, states: str, momentum: Annotated[float, Limits(least=0.0, below=1.0)] = 0.9
) -> AnyRule:
    """A momentum with each row over its rms.

    Args:
        momentum: Share of the old momentum; 0 holds none.
    """
    return Scaled.of(states, momentum=momentum)


@part("rule")
def subset_norm(*, states: str, subset_size: SubsetSize = 0) -> AnyRule:
    """A momentum over norms that rows, columns or other subsets share.

    Args:
        subset_size: Elements of a subset; 0 for rows of a tall matrix, columns of a wide one.
    """
    return SubsetNorm.of(states, size=subset_size)


@part("rule")
def mlorc(*, rank: Size = 4, iterations: Annotated[int, Limits(least=1)] = 1) -> AnyRule:
    """MLorc: Adam with both moments held as products of two thin matrices.

    Args:
        rank: Columns of the thin matrices, or their share of the short side.
        iterations: Power iterations at a step.
    """
    return MLorc(Frame(rank), iterations)
