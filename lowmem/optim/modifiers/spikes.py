"""Modifiers against spikes of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.modifiers.modifier import Modifier


@dataclass(frozen=True)
class SpikeClip(Modifier):
    """Clip what stands out from its own history (SPAM, arXiv 2501.06842): |g| <= sqrt(threshold v).

    v is the second moment before this step, without bias correction. The first steps of a moment, and an
    element whose v is 0, have no history to be judged by. Holds nothing.

    Args:
        threshold: of g^2 over v, above 0.
        guard: steps of a moment before anything is clipped, at least 1.

    Raises:
        UserError: a number outside its range.
    """

    threshold: float = 5000.0
    guard: int = 20
    needs: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        if not self.threshold > 0.0 or self.guard < 1:
            raise UserError(
                f"threshold must be above 0 and guard at least 1, got {self.threshold}, {self.guard}"
            )

    def before(self, g: Tensor, moments: Mapping[str, Tensor], age: Tensor) -> Tensor:
        """The clipped gradient."""
        square = moments["exp_avg_sq"]
        most = square.sqrt() * self.threshold**0.5
        judged = (age >= self.guard) & (square > 0.0)
        return torch.where(judged, torch.minimum(torch.maximum(g, -most), most), g)
