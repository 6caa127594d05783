"""What is planned on the meta device is what is held after k steps, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.memory import count
from lowmem.training.contract import zoo
from lowmem.training.contract.check import tell
from tests.contract import runs
from tests.contract.cases import Case

SHAPES = [(24, 8), (8, 24), (16, 16), (9, 7), (13, 17), (61, 67), (4, 3, 2, 2)]
VECTORS = [(1,), (31,), (257,)]
MIB = 1 << 20


def held(optimizer: Any) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def on_one(case: Case, shape: tuple[int, ...], role: str, dtype: torch.dtype) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    group = {"params": [("layers.0.w", p)], "role": role, "weight_decay": 0.0}
    return lowmem.LowMemOptimizer([group], case.create(), lr=1e-3), p


@pytest.mark.both
@pytest.mark.changed
def test_planned_bytes_are_held_bytes(case: Case, dtype: torch.dtype) -> None:
    for shape, role in [*((s, "matrix") for s in SHAPES), *((s, "other") for s in VECTORS)]:
        optimizer, p = on_one(case, shape, role, dtype)
        g = torch.Generator().manual_seed(0)
        for _ in range(2):
            if case.create().source.needs_autograd:
                p.grad = torch.randn(shape, generator=g).to(dtype)
                tell(optimizer, lambda p=p: p.float().view(-1, 1) * torch.ones(2))
                optimizer.step()
            else:
                optimizer.step(lambda p=p: p.float().sum())
        planned = 0 if optimizer.resting(p) else lowmem.state_bytes(case.create(), shape, dtype, role)
        assert planned == held(optimizer), shape


@pytest.mark.costly("each")
@pytest.mark.changed
def test_planned_bytes_of_a_model_are_held_bytes(case: Case, dtype: torch.dtype) -> None:
    whole = runs.record(case, dtype)
    with torch.device("meta"):
        skeleton = zoo.Zoo().to(dtype)
    planned = count.model_state_bytes(case.create(), skeleton)
    optimizer, model = runs.run(case, dtype, 2)
    assert optimizer.state_bytes() == planned
    assert count.model_state_bytes(case.create(), model) == planned
    last = {"step": runs.STEPS - 1, "decided": whole.decided}
    at_the_end = count.model_state_bytes(case.create(), skeleton, **last)
    assert at_the_end >= whole.bytes_held  # the rest are constants that all tensors share


@pytest.mark.costly("each")
@pytest.mark.changed
def test_keys_shapes_and_dtypes_never_change(case: Case, dtype: torch.dtype) -> None:
    whole = runs.record(case, dtype)
    if case.create().schedule.switches(runs.GAP):
        pytest.skip("its schedule makes state anew when the active tensors change")
    assert all(held == whole.held[0] for held in whole.held[1:])


@pytest.mark.kinds
def test_state_made_before_the_first_step_is_the_state_of_the_run(case: Case, dtype: torch.dtype) -> None:
    model = zoo.build(dtype)
    optimizer = case.optimizer(model)
    optimizer.init_state()
    made = {i: {k: (v.dtype, v.shape) for k, v in s.items()} for i, s in runs.state_of(optimizer).items()}
    assert made == runs.record(case, dtype).held[0]
    for step in range(runs.STEPS):
        runs.advance(optimizer, model, step)
    assert runs.same(zoo.weights(model), runs.record(case, dtype).weights)


@pytest.mark.kinds
def test_state_lives_in_place(case: Case) -> None:
    """Tensors made by the first step are the tensors of the last one."""
    if case.create().schedule.switches(runs.GAP):
        pytest.skip("its schedule makes state anew when the active tensors change")
    optimizer, model = runs.run(case, torch.float32, 1)
    before = {i: {k: v.data_ptr() for k, v in s.items()} for i, s in runs.state_of(optimizer).items()}
    for step in range(1, runs.GAP + 2):
        runs.advance(optimizer, model, step)
    after = {i: {k: v.data_ptr() for k, v in s.items()} for i, s in runs.state_of(optimizer).items()}
    assert before == after


def low_part(rule: Any) -> Any:
    """What says how large that is: a projector, or a rule whose step is a product; None."""
    part = getattr(rule, "projector", rule)
    return part if hasattr(part, "low_shape") else None


def low_elements(strategy: Any, shape: tuple[int, int]) -> int:
    """r l: the size of the projected gradient, or of both factors of a step; none for other rules."""
    low = low_part(strategy.rules["matrix"])
    if low is None:
        return 0
    rows, columns = low.low_shape(shape)
    return int(rows) * int(columns)


def test_scratch_stays_inside_the_bound(case: Case) -> None:
    """64 MiB + 4 r l, as much again for a residual; 12 k^2 for an orthogonal step; 12 s r for a refresh."""
    for shape in ((2048, 5504), (5504, 2048), (32000, 1024)):
        check_scratch(case, shape)


def check_scratch(case: Case, shape: tuple[int, int]) -> None:
    strategy = Case(case.name, tuple((k, 0.25 if k == "rank" else v) for k, v in case.options)).create()
    low = low_elements(strategy, shape)
    rule = strategy.rules["matrix"]
    bound = rule.scratch(shape)
    stepped = low_part(rule).low_shape(shape) if low else shape
    assert bound <= 64 * MIB + 8 * low + 12 * min(stepped) ** 2
    assert count.workspace_bytes(strategy, shape, torch.bfloat16, "matrix", False) <= bound
    x = torch.empty(shape, device="meta")
    basis = low_part(rule).init(x).get("basis", x[:0]).numel() if low else 0  # s r
    refresh = bound + 12 * basis
    if dict(case.options).get("projector") != "svd" and dict(case.options).get("split") != "svd":
        assert count.workspace_bytes(strategy, shape, torch.bfloat16, "matrix", True) <= refresh
