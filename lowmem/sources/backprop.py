"""Gradients by backpropagation: the ordinary case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.source import Named, Query, trainable
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class Backprop:
    """`loss.backward()`; the evidence is `p.grad`."""

    needs_autograd: bool = True
    fused: bool = True
    quantized: bool = False
    holds: bool = False

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def trained(self, model: nn.Module) -> Named:
        """Parameters that require gradients."""
        return trainable(model)

    def backward(
        self, params: Named, loss_fn: Callable[[], Tensor], *, model: nn.Module | None, query: Query
    ) -> tuple[Tensor, Any]:
        """Evaluate the loss and backpropagate."""
        with torch.enable_grad():
            loss = loss_fn()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), None

    def gradients(self, params: Named, evidence: Sequence[Any]) -> Iterator[tuple[nn.Parameter, Blocks]]:
        """Every gradient that is there."""
        for _, p in params:
            if p.grad is not None:
                yield p, Dense(p.grad)

    def settle_(self, params: Named, evidence: Sequence[Any]) -> None:
        """Nothing."""

    def unspread(self) -> str:
        """Nothing: gradients are spread as their weights are."""
        return ""

    def gradient_bytes(self, shapes: Sequence[tuple[torch.Size, torch.dtype]], *, released: bool) -> int:
        """All gradients, or the largest one where each is released when it is used."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        return max(sizes, default=0) if released else sum(sizes)
