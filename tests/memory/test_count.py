"""Bytes counted on meta: against closed forms, and against what a real step holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowmem
from lowmem.memory.count import model_state_bytes, shared_sizes, state_bytes, workspace_bytes
from lowmem.memory.trace.tracker import Tracker
from lowmem.optim.engine import cutting
from lowmem.optim.tensors.groups import param_groups

SHAPES = [(64, 256), (256, 64), (96, 96), (61, 131), (4096,), (7, 3, 5, 1), (1, 1)]


def ceil(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_forms(shape: tuple[int, ...]) -> None:
    """The formulas of the strategies' docstrings."""
    d = math.prod(shape)
    m, n = (1, d) if len(shape) < 2 else (shape[0], d // shape[0])
    small = d < 4096
    assert state_bytes(lowmem.create("adamw"), shape) == 8 * d + 4
    assert state_bytes(lowmem.create("adamw", states="bf16"), shape) == 4 * d + 4
    expected = {
        "int8": 2 * d + 8 * ceil(d, 256) + 4,
        "companded8": 2 * d + 4 * ceil(d, 32) + 4,
        "int4": 2 * ceil(d, 2) + 8 * ceil(d, 128) + 4,
    }
    for states, size in expected.items():
        strategy = lowmem.create("adamw_8bit", states=states)
        assert state_bytes(strategy, shape) == (8 * d + 4 if small else size), states
    if len(shape) > 1:
        short, long = min(m, n), max(m, n)
        r = min(16, short)
        assert state_bytes(lowmem.create("galore", rank=16), shape) == 4 * short * r + 8 * r * long + 4
        columns = max(1, int(0.25 * n))
        assert state_bytes(lowmem.create("frugal"), shape) == 8 * m * columns + 4 * columns + 4
        assert state_bytes(lowmem.create("frugal", projector="randk"), shape) == 9 * ceil(d, 256) * 64 + 4
        assert state_bytes(lowmem.create("adamw", rule="signsgd"), shape) == 0


@pytest.mark.parametrize(("writer", "each"), [("stochastic", 0), ("kahan", 2), ("split", 1)])
def test_writers_hold_what_they_say(writer: str, each: int) -> None:
    strategy = lowmem.create("galore", rank=8, writer=writer)
    plain = state_bytes(lowmem.create("galore", rank=8), (64, 48), torch.bfloat16)
    assert state_bytes(strategy, (64, 48), torch.bfloat16) == plain + each * 64 * 48


def test_tables_are_held_once() -> None:
    """Matrices, embeddings and what lies inside a subspace look into the same tables."""
    one = shared_sizes(lowmem.create("adamw_8bit"), [("matrix", "matrix", (8, 8))])
    assert one
    both = [("matrix", "matrix", (8, 8)), ("other", "embedding", (9, 8))]
    assert shared_sizes(lowmem.create("adamw_8bit"), both) == one
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 128))
    optimizer = lowmem.optimizer(model, "galore", rank=8, states="int8")
    optimizer.init_state()
    assert optimizer.state_bytes() == model_state_bytes(optimizer.strategy, model)


def test_blocks_count_the_active_ones() -> None:
    """A block-wise schedule holds state for the active tensors; the count follows the step."""
    model = nn.Sequential(*[nn.Linear(16, 16 + i) if i == 0 else nn.Linear(16, 16) for i in range(8)])
    strategy = lowmem.create("frugal", projector="none", schedule="blocks", switch_gap=3)
    optimizer = lowmem.LowMemOptimizer(param_groups(model), strategy)
    for step in range(9):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state_bytes() == model_state_bytes(strategy, model, step=step)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "galore", "frugal"])
def test_first_and_last_blocks_stand_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta only the first blocks and the last are walked: as many bytes as for all of them."""
    from lowmem.memory import count
    from lowmem.optim.engine import chunks

    shape = (2500, 1024)
    short = workspace_bytes(lowmem.create(name), shape, torch.bfloat16)
    count._workspace.cache_clear()
    monkeypatch.setattr(chunks, "walk", lambda blocks, x: blocks)
    assert workspace_bytes(lowmem.create(name), shape, torch.bfloat16) == short
    count._workspace.cache_clear()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "galore", "frugal"])
@pytest.mark.parametrize("refresh", [False, True])
def test_workspace_on_meta_is_workspace_on_cpu(name: str, refresh: bool) -> None:
    """What a tracker sees live during a real eager step is what was counted without memory."""
    shape = (96, 320)
    strategy = lowmem.create(name)
    p = nn.Parameter(torch.randn(shape))
    optimizer = lowmem.LowMemOptimizer([("w", p)], strategy, compile="off")
    g = torch.randn(shape)
    optimizer.step_param(p, g)
    optimizer.param_groups[0]["step"] = 0 if refresh else 5
    tracker = Tracker()
    tracker.register([p, g, *optimizer.state[p].values()], "weights")
    tracker.register(optimizer._constants.values(), "weights")
    for constant in optimizer._lookup._made.values():
        tracker.register([constant], "weights")
    before = tracker.live
    with tracker:
        tracker.enter("step", "workspace")
        optimizer.step_param(p, g)
    peak = tracker.peak().total - before
    tracker.stop()
    counted = workspace_bytes(strategy, shape, refresh=refresh)
    # cached constants (a few bytes each) are made once, on meta as part of the step
    assert 0 <= counted - peak <= 256


@pytest.mark.parametrize("compiled", [False, True])
def test_grids_that_are_kept_are_planned(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rounding keeps the indices of its chunks: as many bytes as the plan counts on a CPU."""
    from lowmem.memory.footprint import footprint
    from lowmem.memory.run import Run
    from lowmem.memory.trace.replica import Parameter
    from lowmem.optim.engine import chunks

    if compiled:  # rows as compiled kernels have them, without a compiler
        monkeypatch.setattr(chunks, "compiled", lambda step: step)
    shapes = {"a": (48, 300), "b": (700,), "c": (1300, 1024), "d": (64, 128)}
    for name in ("adamw", "adamw_8bit", "galore"):
        strategy = lowmem.create(name)
        named = {key: nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for key, shape in shapes.items()}
        optimizer = lowmem.LowMemOptimizer(list(named.items()), strategy, compile="on" if compiled else "off")
        for p in named.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        held = sum(t.untyped_storage().nbytes() for grid in optimizer.chunks.grids.values() for t in grid)
        found = [
            Parameter(k, s, torch.bfloat16, "matrix" if len(s) == 2 else "vector") for k, s in shapes.items()
        ]
        planned = footprint(strategy, found, Run(device="cpu", compile="on" if compiled else "off"))
        assert planned.kept == held > 0, name


def test_spans_cover_everything_once() -> None:
    for count in (1, 77, 4096, 70_000, (1 << 20) + 12_293):
        parts = list(cutting.spans(count))
        assert [start for start, _, _ in parts] == [sum(p[1] for p in parts[:i]) for i in range(len(parts))]
        assert sum(length for _, length, _ in parts) == count
        assert all(length <= size and size in cutting.LADDER for _, length, size in parts)
