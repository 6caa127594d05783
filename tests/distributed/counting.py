"""What a rank holds of every method, and what ranks exchange in a step, counted where they step anyhow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import lowmem
from lowmem.memory.count import model_state_bytes
from tests.distributed.placing import sharded, spread
from tests.distributed.zoo import Zoo, gradient
from tests.enrolled import on_any_model

FAR = 10_000
EXCHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "adamw": ({}, 0),
    "galore": ({"rank": 4, "proj_type": "right", "update_proj_gap": FAR}, 1),
    "grades": ({}, 1),
    "misa": ({}, 1),
}
"""Sums over ranks in an ordinary step, however many tensors there are."""


def held(mesh: Any) -> list[str]:
    """Methods of which a rank holds other bytes than were planned."""
    model, found = sharded(torch.float32, mesh), []
    auto = {"proj_type": "auto"}
    where = {"ranks": mesh.size(), "rank": mesh.get_rank()}
    for name, options in [*((name, {}) for name in on_any_model()), ("galore", auto)]:
        optimizer = lowmem.optimizer(model, name, **options)
        optimizer.init_state()
        planned = model_state_bytes(lowmem.create(name, **options), Zoo(), **where)
        if planned != (own := optimizer.state_bytes()):
            found.append(f"{name} {options} holds {own} bytes of state, {planned} were planned")
    right = lowmem.create("galore", proj_type="right")
    if (found_side := optimizer.strategy) != right or planned != model_state_bytes(right, Zoo(), **where):
        found.append(f"auto became {found_side}, not {right}")
    return found


def exchanged(mesh: Any) -> list[str]:
    """Methods whose second step exchanges more or less than is known."""
    found = []
    for name, (options, known) in EXCHANGES.items():
        model = sharded(torch.float32, mesh)
        optimizer = lowmem.optimizer(model, name, **options)
        for step in range(2):
            for i, p in enumerate(model.parameters()):
                p.grad = spread(gradient(tuple(p.shape), step, i, False), p) if p.requires_grad else None
            with counted() as calls:
                optimizer.step()
        if dict(calls) != ({"all_reduce": known} if known else {}):
            found.append(f"a step of {name} exchanges {dict(calls)}, not {known} sums")
    return found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count collectives."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        call = getattr(dist, name)

        def count(*args: Any, **given: Any) -> Any:
            calls[name] += 1
            return call(*args, **given)

        return count

    with ExitStack() as stack:
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor"):
            stack.enter_context(patch.object(dist, name, counting(name)))
        yield calls
