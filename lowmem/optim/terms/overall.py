"""What is known of a step before its first tensor takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Overall:
    """What is known of a step before the first tensor takes it, by the names of rules.

    Args:
        sums: over all tensors, (k,) fp64 each; held: numbers that all tensors share, (j,) fp64 each.
        own: what each tensor added, by its name; one that is not finite adds nothing.
        loss: of the step, 0-D fp64, where it is known.
    """

    sums: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    loss: Tensor | None = None
