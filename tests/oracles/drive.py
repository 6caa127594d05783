"""Drive lowmem on bare tensors, so that a reference can be held against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lowmem = pytest.importorskip("lowmem")


def need(*names: str) -> None:
    """Skip until the strategies are registered."""
    missing = [name for name in names if name not in lowmem.available()]
    if missing:
        pytest.skip(f"not registered: {', '.join(missing)}")


def on_weights(
    name: str, tensors: dict[str, Tensor], role: str = "matrix", *, hyper: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, nn.Parameter]]:
    """An optimizer over copies of named tensors that all take one role."""
    params = {key: nn.Parameter(value.detach().clone()) for key, value in tensors.items()}
    strategy = lowmem.create(name, **options)
    decay = hyper.get("weight_decay", 0.0)
    group = {"params": list(params.items()), "role": role, "weight_decay": decay}
    return lowmem.LowMemOptimizer([group], strategy, **hyper), params


def step(optimizer: Any, params: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for key, p in params.items():
        p.grad = grads[key].to(p.dtype).clone()
    optimizer.step()


def follow(
    name: str,
    start: Tensor,
    grads: Sequence[Tensor],
    role: str = "matrix",
    key: str = "w",
    watch: Callable[[Any, Tensor], None] | None = None,
    *,
    hyper: dict[str, Any],
    **options: Any,
) -> list[Tensor]:
    """The weights after each step of one tensor; `watch(optimizer, weight)` looks in after each."""
    optimizer, params = on_weights(name, {key: start}, role, hyper=hyper, **options)
    weights = []
    for g in grads:
        step(optimizer, params, {key: g})
        weights.append(params[key].detach().clone())
        if watch is not None:
            watch(optimizer, params[key])
    return weights


def gradients(shape: Sequence[int], steps: int, seed: int = 3, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(tuple(shape), generator=g) for _ in range(steps)]


def start_of(shape: Sequence[int], seed: int = 5) -> Tensor:
    return 0.1 * torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def name_without_offset(gap: int) -> str:
    """A parameter name whose refreshes fall on the multiples of the gap, as in the papers."""
    from lowmem.optim.terms.hyper import stagger

    return next(f"w{i}" for i in range(10_000) if stagger(f"w{i}", gap) == 0)
