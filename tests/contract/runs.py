"""Short runs on the zoo: recorded once for each case, looked at by many tests."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.contract import zoo
from tests.contract.cases import GAP, Case

STEPS = 2 * GAP + 2
SAVED = (1, GAP - 1, GAP, GAP + 1)
"""Names stagger the refreshes, so each of these is on a refresh for some tensors and between for others."""


def advance(optimizer: Any, model: nn.Module, step: int, **size: int) -> float:
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
    optimizer.step()
    optimizer.zero_grad()
    return grads


def stepping(optimizer: Any, model: nn.Module) -> set[str]:
    """Names of the tensors that the next step moves: a schedule may let others rest."""
    rules = optimizer.strategy.rules
    return {name for name, p in model.named_parameters() if not rules[optimizer.rule_name(p)].idle}


def state_of(optimizer: Any) -> dict[int, dict[str, Tensor]]:
    """The state tensors, by the position of their parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: dict(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, dtypes and shapes included; NaN equals NaN."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or (
            a.is_floating_point() and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def to_file(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def from_file(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


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
