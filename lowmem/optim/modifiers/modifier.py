"""The contract of a modifier: what a paper adds to any optimizer.

A modifier may change the gradient (`before`), change the step element by element
(`shape`), and multiply all of it by a number that depends on the whole tensor
(`factor`, from what `measure` gives for each element and the frame sums). It knows
neither how a tensor is cut nor where it lies; all of this is pure, and the frame
keeps what is not finite, and padding, out of the sums. What happens by the clock
(`begin_`) happens before: a modifier may let the rule forget its moments, and
multiply steps by a number that it then holds.

In a chain, a modifier sees the step as those before it shaped it, but not yet
multiplied: their factors are known when all sums are. So shapes let positive
factors through, shape(g, c d) = c shape(g, d), and each sum says with which power
of the step it grows: the frame makes up for the factors by it. One pass over the
tensor serves the whole chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State

NONE: Mapping[str, Tensor] = MappingProxyType({})
"""No moments."""


class Modifier:
    """A modifier; subclasses are frozen dataclasses.

    Attributes:
        sums: for each number that is summed over the tensor, the power of the step with which it grows.
        needs: moments that it reads as they were before the step, a number for each element.
        reads_gradient: `shape` or `measure` look at the gradient; if not, a projected one is enough.
        reads_weight: `measure` looks at the weight.
        resets: `begin_` may ask that moments are forgotten.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    reads_gradient: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    resets: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[int, ...]:
        """Nothing is summed."""
        return ()

    @property
    def paces(self) -> bool:
        """Whether `factor` is a number that is held as "pace" and needs no sums."""
        return False

    def init(self, x: Tensor) -> State:
        """What is held of a tensor like x: 0-D tensors; nothing."""
        return {}

    def begin_(self, s: State, hp: Hyper) -> bool:
        """Before a step, by the clock: bring what is held up to date; True where moments are forgotten."""
        return False

    def before(self, g: Tensor, moments: Mapping[str, Tensor], age: Tensor) -> Tensor:
        """The gradient that the rule sees.

        Args:
            g: fp32; moments: those that it `needs`.
            age: steps that they have seen with this one; int32, 0-D or for each element.
        """
        return g

    def shape(self, g: Tensor, d: Tensor, moments: Mapping[str, Tensor] = NONE) -> Tensor:
        """The step that is taken, up to the factor."""
        return d

    def measure(
        self, g: Tensor, d: Tensor, w: Tensor | None, moments: Mapping[str, Tensor] = NONE
    ) -> tuple[Tensor, ...]:
        """For each of the `sums` a number of each element, from the step before `shape`."""
        return ()

    def factor(self, sums: Sequence[Tensor], s: State) -> tuple[Tensor, State]:
        """What the step is multiplied by, above 0; and what is held from now on.

        Args:
            sums: over the tensor, 0-D fp64, the factors of modifiers before this one made up for.
            s: what is held.
        """
        return torch.ones((), dtype=torch.float64), {}
