"""Short runs on the zoo: recorded once for each case, looked at by many tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.training.contract import zoo
from lowmem.training.contract.check import from_file, same, state_of, stepping, tell, to_file
from tests.contract.cases import GAP, Case

__all__ = [
    "advance", "feed", "finish", "from_file", "record", "run", "same", "state_of", "stepping", "tell",
    "to_file",
]  # fmt: skip

STEPS = 2 * GAP + 2
SAVED = (1, GAP - 1, GAP, GAP + 1)
"""Names stagger the refreshes, so each of these is on a refresh for some tensors and between for others."""


def advance(optimizer: Any, model: nn.Module, step: int, **size: int) -> float:
    if optimizer.probe_due:
        optimizer.probe(model(zoo.batch(step, **size)[0]))
    loss = optimizer.backward(lambda: zoo.loss_of(model, step, **size), model)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def run(case: Case, dtype: torch.dtype, steps: int = STEPS, **hyper: Any) -> tuple[Any, zoo.Zoo]:
    model = zoo.build(dtype)
    optimizer = case.optimizer(model, **hyper)
    for step in range(steps):
        advance(optimizer, model, step)
    return optimizer, model


def feed(optimizer: Any, model: nn.Module, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """One step by random gradients; returns them."""
    g = torch.Generator().manual_seed(seed)
    grads = {}
    for name, p in model.named_parameters():
        grads[name] = scale * torch.randn(p.shape, generator=g)
        p.grad = grads[name].to(p.dtype)
    tell(optimizer, lambda: model(zoo.batch(seed)[0]))
    optimizer.step()
    optimizer.zero_grad()
    return grads


@dataclass
class Record:
    """An uninterrupted run: its end, and what a checkpoint would have held on the way."""

    weights: dict[str, Tensor]
    state: dict[int, dict[str, Tensor]]
    held: list[dict[int, dict[str, tuple[torch.dtype, torch.Size]]]] = field(default_factory=list)
    saved: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    bytes_held: int = 0
    decided: str = ""


@functools.cache
def record(case: Case, dtype: torch.dtype) -> Record:
    model = zoo.build(dtype)
    optimizer = case.optimizer(model)
    out = Record({}, {})
    for step in range(STEPS):
        if step in SAVED:
            out.saved[step] = (to_file(model.state_dict()), to_file(optimizer.state_dict()))
        out.losses.append(advance(optimizer, model, step))
        out.held.append(
            {i: {k: (v.dtype, v.shape) for k, v in s.items()} for i, s in state_of(optimizer).items()}
        )
    out.decided = optimizer.param_groups[0]["decided"]
    out.weights, out.state = zoo.weights(model), state_of(optimizer)
    out.bytes_held = sum(v.nbytes for s in out.state.values() for v in s.values())
    return out


def finish(
    case: Case, dtype: torch.dtype, model_file: bytes, optimizer_state: Any, at: int
) -> tuple[Any, zoo.Zoo]:
    """A fresh process's view: new model, new optimizer, loaded state, the steps that were left."""
    model = zoo.build(dtype, seed=99)
    model.load_state_dict(from_file(model_file))
    optimizer = case.optimizer(model, lr=0.5)  # the checkpoint knows better
    optimizer.load_state_dict(optimizer_state)
    for step in range(at, STEPS):
        advance(optimizer, model, step)
    return optimizer, model
