"""Small problems that the tests of sources share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.optim.source import Query
from lowmem.sources.spsa import SPSA


class Vector(nn.Module):
    """One weight, and a module that owns it, so that a probe can be hooked to it."""

    def __init__(self, *shape: int, fill: float | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.weight = nn.Parameter((drawn if fill is None else torch.full(shape, fill)).to(dtype))

    def forward(self) -> Tensor:
        return self.weight.clone()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluated(source: SPSA, model: nn.Module, loss: Callable[[], Tensor], step: int = 0) -> tuple[Any, ...]:
    params = list(model.named_parameters())
    return source.backward(params, loss, model=model, query=Query(0, step))


def estimate(source: SPSA, model: nn.Module, loss: Callable[[], Tensor], step: int = 0) -> Tensor:
    """The whole gradient estimate of a model of one weight, fp64."""
    _, evidence = evaluated(source, model, loss, step)
    ((p, g),) = source.gradients(list(model.named_parameters()), [evidence])
    return g.rows(0, g.shape[0]).reshape(p.shape).double()


def direction(source: SPSA, model: nn.Module, step: int = 0, k: int = 0) -> Tensor:
    """The k-th direction of a step for a model of one weight, fp64."""
    ((name, p),) = model.named_parameters()
    z = source.structure.direction(source.noise, Query(0, step), k)
    return z.draw(name, p.detach(), 0, p.numel()).view(p.shape).double()
