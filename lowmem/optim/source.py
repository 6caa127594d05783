"""Where a gradient comes from, as the optimizer sees it.

What was paid for differs: a backward pass leaves a gradient in every parameter,
two values of the loss leave one number and the name of a random direction. Both
are evidence, from which the gradient of one tensor after another is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.optim.blocks import Blocks

Named = Sequence[tuple[str, nn.Parameter]]


class Source(Protocol):
    """Where gradients come from; a frozen dataclass.

    Attributes:
        needs_autograd: whether a graph is recorded; without it no activation is saved.
    """

    @property
    def needs_autograd(self) -> bool: ...

    def backward(
        self, params: Named, loss_fn: Callable[[], Tensor], *, model: nn.Module | None, seed: int, step: int
    ) -> tuple[Tensor, Any]:
        """Evaluate the loss and leave evidence of its gradient.

        Args:
            params: names and parameters, in any order.
            loss_fn: the loss of one batch, scalar; may be called several times, on the same batch.
            model: owner of the parameters, for sources that probe inside its forward.
            seed, step: name the random directions.

        Returns:
            The loss (detached), and evidence for `gradients`, or None.
        """

    def gradients(self, params: Named, evidence: Sequence[Any]) -> Iterator[tuple[nn.Parameter, Blocks]]:
        """The gradient of each parameter that has one, summed over the evidence."""

    def gradient_bytes(self, shapes: Sequence[tuple[torch.Size, torch.dtype]], *, released: bool) -> int:
        """Bytes of gradients alive at the end of a backward pass, at most."""
