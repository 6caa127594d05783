"""Numbers at the ends of their range: eps of nothing, weights of float64, fp16 weights that run over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.training.contract import zoo
from tests.contract import runs
from tests.contract.cases import Case

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler


def by_backward(case: Case) -> None:
    if not case.by_backward:
        pytest.skip("it does not step by p.grad")


def stepped(case: Case, model: nn.Module, scale: float, **hyper: Any) -> Any:
    """After a few steps by random gradients, of which every other one is zero, the first included."""
    optimizer = case.optimizer(model, **hyper)
    for step in range(runs.GAP + 2):
        runs.feed(optimizer, model, step, scale * (step % 2))
    return optimizer


@pytest.mark.kinds
@pytest.mark.parametrize(("eps", "scale"), [(0.0, 1.0), (0.0, 1e-22), (1e-40, 1e-22)])
def test_no_eps_is_too_small(case: Case, eps: float, scale: float) -> None:
    """Zero beside zero is no step, and gradients without an fp32 square are no leap."""
    by_backward(case)
    if not case.reads("eps"):
        pytest.skip("no rule reads eps")
    model = zoo.build()
    before = zoo.weights(model)
    optimizer = stepped(case, model, scale, eps=eps, weight_decay=0.0)
    usual = zoo.build()
    stepped(case, usual, scale, weight_decay=0.0)
    moved = {name: (w - before[name]).abs().max() for name, w in zoo.weights(usual).items()}
    assert optimizer.nonfinite() == 0
    for name, w in zoo.weights(model).items():
        assert torch.isfinite(w).all(), name
        usually = max(float(moved[name]), 1e-2 * runs.GAP)  # a step of lr, or what the method takes anyway
        assert (w - before[name]).abs().max() <= 10 * usually, name


def test_without_eps_adamw_is_torchs_where_that_is_a_number() -> None:
    ours, theirs = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    one = lowmem.LowMemOptimizer([ours], lowmem.create("adamw"), lr=1e-2, eps=0.0)
    other = torch.optim.AdamW([theirs], lr=1e-2, eps=0.0, weight_decay=0.0)
    for seed in range(4):
        g = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        g[0] = 0.0
        ours.grad, theirs.grad = g, g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-6, atol=1e-7)
    assert theirs[0].isnan().all()
    assert torch.equal(ours[0], torch.ones(8))


def test_float64_weights_lose_no_bit_where_nothing_moves(case: Case) -> None:
    model = zoo.build(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 + 1e-12)
    before = zoo.weights(model)
    optimizer = case.optimizer(model, lr=0.0)
    for step in range(runs.GAP + 1):
        runs.advance(optimizer, model, step)
    assert runs.same(zoo.weights(model), before)


def test_float64_weights_take_steps_below_what_fp32_resolves(case: Case) -> None:
    model = zoo.build(torch.float64)
    before = zoo.weights(model)
    optimizer, active = case.optimizer(model, lr=1e-11, weight_decay=0.1), set()
    for step in range(runs.GAP + 1):
        active |= runs.stepping(optimizer, model)
        runs.advance(optimizer, model, step)
    for name, w in ((name, w) for name, w in zoo.weights(model).items() if name in active):
        moved = (w - before[name]).abs()
        assert 0.0 < moved.max() < 1e-7, name
        assert not torch.equal(w, w.float().double()), name


@pytest.mark.parametrize("compile", ["on", "off"])
def test_float64_decay_and_steps_are_torchs(compile: str) -> None:
    start = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    hyper: dict[str, Any] = {"lr": 1e-6, "weight_decay": 1e-3}
    one = lowmem.LowMemOptimizer([ours], lowmem.create("adamw"), compile=compile, **hyper)
    other = torch.optim.AdamW([theirs], **hyper)
    for seed in range(4):
        g = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).double()
        ours.grad, theirs.grad = g, g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 1e-6 * 1e-6)  # the directions are fp32


@pytest.mark.parametrize("writer", ["stochastic", "nearest", "kahan"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_fp16_weights_that_run_over_stay_and_are_counted(writer: str, compile: str) -> None:
    most = torch.finfo(torch.float16).max
    start = torch.full((64, 64), 1.0, dtype=torch.float16)
    start[:, ::3] = most
    p = nn.Parameter(start.clone())
    strategy = lowmem.create("adamw", writer=writer)
    optimizer = lowmem.LowMemOptimizer([p], strategy, lr=100.0, compile=compile)
    for steps in (1, 2, 3):
        p.grad = torch.full_like(start, -1.0)
        optimizer.step()
        assert torch.isfinite(p).all()
        assert torch.equal(p[:, ::3], start[:, ::3])
        assert (p[:, 1::3] > 100.0 * steps).all()
        assert optimizer.nonfinite() == steps * start[:, ::3].numel()
    assert all(value.isfinite().all() for value in optimizer.state[p].values())
    p.grad = torch.full_like(start, 50.0)
    optimizer.step()  # back into the range
    assert (p[:, ::3] < most).all()


def test_fp16_weights_of_every_method_stay_finite(case: Case) -> None:
    by_backward(case)
    model = zoo.build(torch.float16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(60_000.0)
    optimizer = stepped(case, model, -1.0, lr=1e6, weight_decay=0.0)
    assert optimizer.nonfinite() > 0 or "relative_step" in case.varied  # that one has small steps of its own
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "galore", "mezo"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(4, 6), "shape"),
        (torch.ones(24), "shape"),
        (torch.ones(()), "shape"),
        (torch.ones(6, 4, dtype=torch.int64), "int64"),
        (torch.ones(6, 4, dtype=torch.complex64), "complex64"),
        (torch.ones(6, 4).to_sparse(), "sparse"),
        (torch.ones(6, 4, device="meta"), "meta"),
    ],
    ids=str,
)
def test_a_gradient_of_something_else_is_refused(name: str, given: torch.Tensor, said: str) -> None:
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = lowmem.LowMemOptimizer([("the.weight", p)], lowmem.create(name), lr=0.1)
    with pytest.raises(UserError, match=rf"the\.weight.*{said}"):
        optimizer.step_param(p, given)
    assert torch.equal(p, torch.ones(6, 4))
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gradient_of_another_precision_is_taken(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = lowmem.LowMemOptimizer([p], lowmem.create("adamw"), lr=0.1)
    optimizer.step_param(p, torch.ones(6, 4, dtype=dtype))
    torch.testing.assert_close(p.detach(), torch.full((6, 4), 0.9))


def test_sparse_gradients_are_refused_from_step_too() -> None:
    p = nn.Parameter(torch.ones(10, 4))
    optimizer = lowmem.LowMemOptimizer([("the.weight", p)], lowmem.create("adamw"), lr=0.1)
    nn.functional.embedding(torch.tensor([1, 2]), p, sparse=True).sum().backward()
    with pytest.raises(UserError, match=r"the\.weight.*sparse=False"):
        optimizer.step()
