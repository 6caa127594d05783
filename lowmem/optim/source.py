"""Where a gradient comes from, as the optimizer sees it.

What was paid for differs: a backward pass leaves a gradient in every parameter,
two values of the loss leave one number and the name of a random direction. Both
are evidence, from which the gradient of one tensor after another is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.tensors.marks import trains
from lowmem.optim.terms.state import State

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Query:
    """Where in a run the loss is evaluated: what names the random directions of this evaluation.

    Args:
        seed: of the run.
        step: completed steps before this one.
        index: evaluations since the last step; micro-batches take directions of their own.
        compile: kernels are compiled in this run, which may change the last bit of what they draw.
        held: what the source holds, by the names of tensors.
    """

    seed: int
    step: int
    index: int = 0
    compile: bool = False
    held: Mapping[str, State] = field(default_factory=dict, compare=False, repr=False)


def trainable(model: nn.Module) -> Named:
    """Names and parameters that are trained, now or in turn, in the order of the model, tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if trains(p)]


class Source(Protocol):
    """Where gradients come from; a frozen dataclass.

    Attributes:
        needs_autograd: whether a graph is recorded; without it no activation is saved.
        fused: whether fused attention runs under it; else its scores exist.
        quantized: whether it trains the scales of quantized weights instead of a model's parameters.
        holds: whether it holds a state of its own for each tensor, that steps change.
    """

    @property
    def needs_autograd(self) -> bool: ...
    @property
    def fused(self) -> bool: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def holds(self) -> bool: ...

    def init(self, x: Tensor) -> State:
        """What is held for a tensor like x."""

    def trained(self, model: nn.Module) -> Named:
        """What it has to train: parameters that require gradients, or other tensors; tied ones once."""

    def backward(
        self, params: Named, loss_fn: Callable[[], Tensor], *, model: nn.Module | None, query: Query
    ) -> tuple[Tensor, Any]:
        """Evaluate the loss and leave evidence of its gradient.

        Args:
            params: names and parameters, in any order.
            loss_fn: the loss of one batch, scalar; may be called several times, on the same batch.
            model: owner of the parameters, for sources that probe inside its forward.
            query: names the random directions.

        Returns:
            The loss (detached), and evidence for `gradients`, or None.
        """

    def gradients(self, params: Named, evidence: Sequence[Any]) -> Iterator[tuple[nn.Parameter, Blocks]]:
        """The gradient of each parameter that has one, summed over the evidence."""

    def settle_(self, params: Named, evidence: Sequence[Any]) -> None:
        """Called when all of them have been stepped: what it holds, or keeps in bounds, is its own."""

    def unspread(self) -> str:
        """What does not go with weights whose rows are spread over ranks, with the remedy; or empty."""

    def gradient_bytes(self, shapes: Sequence[tuple[torch.Size, torch.dtype]], *, released: bool) -> int:
        """Bytes of gradients alive at the end of a backward pass, at most."""


def check_asked(name: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the step of a strategy without gradients whose loss nobody evaluated; with lr 0 it is none."""
    if any(float(group["lr"]) for group in groups):
        raise UserError(
            f"{name} takes no gradients, and step() has nothing to go by: call optimizer.backward(loss_fn), "
            "or step(loss_fn), where loss_fn gives the loss of the batch, in the place of loss.backward()"
        )
