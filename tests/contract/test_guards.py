"""Bad gradients: state stays finite, bad elements keep their weight, and everything is counted."""

from __future__ import annotations

import pytest
import torch

from lowmem.training.contract import zoo
from lowmem.training.contract.check import all_finite, seen, spoiled
from tests.contract import runs
from tests.contract.cases import Case


@pytest.fixture(autouse=True)
def _by_backward(request: pytest.FixtureRequest) -> None:
    if "case" in request.fixturenames and not request.getfixturevalue("case").by_backward:
        pytest.skip("it does not step by p.grad")


@pytest.mark.both
@pytest.mark.costly("each")
@pytest.mark.changed
def test_bad_elements_keep_their_weight_and_are_counted(case: Case, dtype: torch.dtype) -> None:
    for at in (0, 2):
        check_bad_elements(case, dtype, at)


def check_bad_elements(case: Case, dtype: torch.dtype, at: int) -> None:
    model = zoo.build(dtype)
    optimizer = case.optimizer(model, weight_decay=0.0)
    for step in range(at):
        runs.feed(optimizer, model, step)
    assert optimizer.nonfinite() == 0
    before, looked_at = zoo.weights(model), seen(optimizer, model)
    where = spoiled(model, 77)
    optimizer.step()
    optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach()[where[name]], before[name][where[name]]), name
    assert all_finite(optimizer, model)
    assert optimizer.nonfinite() >= looked_at
    counted, active = optimizer.nonfinite(), set()
    for step in range(runs.GAP + 1):
        active |= runs.stepping(optimizer, model)
        runs.feed(optimizer, model, 200 + step)
    assert all_finite(optimizer, model)
    assert optimizer.nonfinite() == counted
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    # a rule that finds its own rate begins below what bf16 resolves
    assert moved <= active if dtype == torch.bfloat16 and case.create().waits else moved == active


def test_a_gradient_of_nothing_but_nan_stops_every_tensor(case: Case, dtype: torch.dtype) -> None:
    model = zoo.build(dtype)
    optimizer = case.optimizer(model, weight_decay=0.1)
    runs.feed(optimizer, model, 0)
    before, active = zoo.weights(model), runs.stepping(optimizer, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert runs.same(zoo.weights(model), before)
    assert optimizer.nonfinite() == sum(before[name].numel() for name in active)


def test_a_zero_gradient_is_an_ordinary_one(case: Case, dtype: torch.dtype) -> None:
    """The step is taken, moments decay, clocks move; nothing turns into NaN, then or later."""
    model = zoo.build(dtype)
    optimizer = case.optimizer(model)
    for step in range(runs.STEPS):
        if step % 3 == 0:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        else:
            runs.feed(optimizer, model, step)
    assert all_finite(optimizer, model)
    assert optimizer.nonfinite() == 0
    assert {group["step"] for group in optimizer.param_groups} == {runs.STEPS}


@pytest.mark.parametrize("scale", [1e-30, 1e16])
def test_huge_and_tiny_gradients_are_ordinary_ones(case: Case, scale: float) -> None:
    """Sums of squares reach 1e36: bases must scale before they square again."""
    model = zoo.build()
    optimizer = case.optimizer(model)
    for step in range(runs.GAP + 2):
        runs.feed(optimizer, model, step, scale)
    assert all_finite(optimizer, model)
    assert optimizer.nonfinite() == 0


@pytest.mark.kinds
def test_a_parameter_without_gradient_is_left_out(case: Case) -> None:
    model = zoo.build()
    optimizer = case.optimizer(model)
    before = zoo.weights(model)
    moving = runs.stepping(optimizer, model) - {"layers.1.o_proj.weight"}
    for _ in range(3):
        for name, p in model.named_parameters():
            slope = torch.linspace(1.0, 2.0, p.numel()).view_as(p)
            p.grad = slope if name in moving else None
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) != (name in moving), name
