"""Rules that need a number of the whole tensor, or look at the weight, before they step."""

from __future__ import annotations

from typing import Annotated

from lowmem.optim.contract import AnyRule
from lowmem.optim.rules.measured.measured import MARS, FAdam, Gravity
from lowmem.optim.rules.measured.momenta import TAM, CriticalAdam
from lowmem.optim.rules.measured.weighed import AdamP
from lowmem.strategies.options import Limits
from lowmem.strategies.parts import part


@part("rule")
def mars(*, states: str, gamma: Annotated[float, Limits(least=0.0)] = 0.025) -> AnyRule:
    """MARS: Adam of gradients with less variance.

    Args:
        gamma: Strength of the correction by the gradient before.
    """
    return MARS.of(states, gamma=gamma)


@part("rule")
def fadam(*, states: str, clip: Annotated[float, Limits(above=0.0)] = 1.0) -> AnyRule:
    """FAdam: an average of clipped natural gradients.

    Args:
        clip: Largest rms of a natural gradient.
    """
    return FAdam.of(states, clip=clip)


@part("rule")
def gravity(*, states: str) -> AnyRule:
    """Gravity: momentum of gradients whose large elements are pulled back."""
    return Gravity.of(states)


@part("rule")
def tam(
    *, states: str, adaptive: bool = False, gamma: Annotated[float, Limits(least=0.0, below=1.0)] = 0.9
) -> AnyRule:
    """TAM: momentum to which a gradient adds as far as it points the same way.

    Args:
        adaptive: Divide by the root of a second moment, as Adam does.
        gamma: Share of the old average of cosines.
    """
    return TAM.of(states, adaptive=adaptive, gamma=gamma)


@part("rule")
def adam_cm(*, states: str, decay: Annotated[float, Limits(above=0.0, most=1.0)] = 0.7) -> AnyRule:
    """Adam that remembers the momenta of its largest gradients.

    Args:
        decay: Of the priority of a momentum that is kept, at each step.
    """
    return CriticalAdam.of(states, decay=decay)


@part("rule")
def adamp(
    *,
    states: str,
    delta: Annotated[float, Limits(above=0.0)] = 0.1,
    wd_ratio: Annotated[float, Limits(least=0.0, most=1.0)] = 0.1,
) -> AnyRule:
    """AdamP: no step along a weight whose length is free.

    Args:
        delta: Cosine of gradient and weight, times the root of the size, below which it is taken as free.
        wd_ratio: Share of the decay that is left then.
    """
    return AdamP.of(states, delta=delta, wd_ratio=wd_ratio)
