"""The launches of a step are kept for the next one, and found anew wherever they would be others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lowmem
from lowmem.optim.engine import ages, chunks, run
from lowmem.optim.engine.cutting import policy
from lowmem.optim.tensors import seats

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler

SHAPES = ((64, 128), (96, 256), (4096, 320))
"""One piece, one of fewer rows, several pieces."""
Change = Callable[[lowmem.LowMemOptimizer, list[nn.Parameter], int], None]


def turned(optimizer: lowmem.LowMemOptimizer, params: list[nn.Parameter], step: int) -> None:
    """Weights, and later gradients, that are not contiguous."""
    if step == 3:
        params[0].data = params[0].data.t().contiguous().t()
    if step == 4:
        grad = params[1].grad
        assert grad is not None
        params[1].grad = grad.t().contiguous().t()


def replaced(optimizer: lowmem.LowMemOptimizer, params: list[nn.Parameter], step: int) -> None:
    """Weights in other memory, a state that is made anew, gradients that are not finite."""
    if step == 2:
        params[0].data = params[0].data.clone()
    if step == 3:
        optimizer.state[params[1]].clear()
    if step == 4:
        grad = params[2].grad
        assert grad is not None
        grad[7, 3] = torch.nan


def scheduled(optimizer: lowmem.LowMemOptimizer, params: list[nn.Parameter], step: int) -> None:
    """Other numbers at every step."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / (1 + step)
        group["betas"] = (0.9, 0.99 + 0.001 * step)
        group["weight_decay"] = 0.1 * step


def other_dtype(optimizer: lowmem.LowMemOptimizer, params: list[nn.Parameter], step: int) -> None:
    """A gradient of another precision now and then."""
    if step % 2 and params[1].dtype == torch.float32:
        params[1].grad = None
        params[1].grad_dtype = torch.bfloat16
        params[1].grad = grads(params, step)[1].to(torch.bfloat16)


def nothing(optimizer: lowmem.LowMemOptimizer, params: list[nn.Parameter], step: int) -> None:
    """The same again."""


def grads(params: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def taken(
    name: str, dtype: torch.dtype, change: Change, made: list[Any], device: str = "", **options: Any
) -> list[Tensor]:
    """Weights and states after six steps; `made` gets the number of passes that each step has made."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = lowmem.optimizer(params, name, lr=1e-3, compile="on", **options)
    with policy(device):
        for step in range(6):
            for p, g in zip(params, grads(params, step), strict=True):
                p.grad_dtype = None
                p.grad = g
            change(optimizer, params, step)
            made.append(0)
            optimizer.step()
    held = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    return [*params, *held, torch.tensor(optimizer.nonfinite())]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that nobody compiles, which would take seconds for each case."""
    monkeypatch.setattr(chunks, "compiled", lambda step: step)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes each step has made."""
    made: list[int] = []
    begin = run.Pass.__init__

    def counted(self: run.Pass, *args: Any, **kwargs: Any) -> None:
        made[-1] += 1
        begin(self, *args, **kwargs)

    monkeypatch.setattr(run.Pass, "__init__", counted)
    return made


def same(monkeypatch: pytest.MonkeyPatch, *asked: Any) -> None:
    """Whether steps leave the bits that they leave where nothing is kept."""
    found = taken(*asked)
    monkeypatch.setattr(run.Course, "serves", staticmethod(lambda *given: False))
    for x, y in zip(found, taken(*asked), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("change", [nothing, turned, replaced, scheduled, other_dtype])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "lamb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["", "cuda"])
def test_bits_are_those_of_steps_that_keep_nothing(
    monkeypatch: pytest.MonkeyPatch,
    passes: list[int],
    name: str,
    dtype: torch.dtype,
    change: Change,
    device: str,
) -> None:
    same(monkeypatch, name, dtype, change, passes, device)


@pytest.mark.parametrize("change", [replaced, scheduled])
def test_the_same_of_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, passes: list[int], change: Change
) -> None:
    same(monkeypatch, "adamw", torch.float32, change, passes)


@pytest.mark.usefixtures("eager")
def test_a_step_like_the_one_before_makes_no_pass(passes: list[int]) -> None:
    taken("adamw", torch.float32, nothing, passes)
    assert passes == [3, 0, 0, 0, 0, 0]
    passes.clear()
    taken("adamw", torch.float32, turned, passes)
    assert passes == [3, 0, 0, 1, 2, 1]  # a weight that is contiguous no more, and one gradient


@pytest.mark.usefixtures("eager")
def test_a_table_of_ages_that_grows_is_read_by_another_kernel(
    monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    monkeypatch.setattr(ages, "ROWS", 2)
    found = taken("adamw", torch.float32, nothing, passes, "cuda")
    assert passes == [1, 1, 0, 1, 0, 0]  # 2, 4 and 8 ages; small tensors step together
    for x, y in zip(found, taken("adamw", torch.float32, nothing, passes), strict=True):
        assert torch.equal(x, y)


def stepped() -> tuple[nn.Parameter, lowmem.LowMemOptimizer]:
    """A weight that has been stepped twice, and its optimizer."""
    p = nn.Parameter(torch.ones(64, 256))
    optimizer = lowmem.optimizer([p], "adamw", lr=1e-3, compile="on")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p, optimizer


@pytest.mark.usefixtures("eager")
def test_no_gradient_is_held_by_what_is_kept() -> None:
    p, optimizer = stepped()
    held = weakref.ref(p.grad)
    optimizer.zero_grad()
    gc.collect()
    assert held() is None


@pytest.mark.usefixtures("eager")
def test_a_weight_may_leave_its_memory() -> None:
    p, _optimizer = stepped()
    memory = StorageWeakRef(p.untyped_storage())
    p.data = torch.empty(0)
    gc.collect()
    assert memory.expired()


def test_a_roster_that_stays_keeps_few_lists_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "KEPT", 3)
    params = [(f"layers.{i}.w", nn.Parameter(torch.ones(8, 8))) for i in range(4)]
    optimizer = lowmem.optimizer(params, "badam", lr=1e-3, switch_gap=1)
    rosters = []
    for _ in range(12):
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        rosters.append(optimizer.roster)
    assert len(set(map(id, rosters))) == 1
    assert 0 < len(optimizer.roster._names) <= 3
