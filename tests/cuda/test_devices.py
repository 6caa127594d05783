"""What must hold on every device: the contract's heart, the oracles, no synchronisation, the benchmark.

Each test runs on the CPU here and, marked, on a CUDA GPU where there is one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.memory.count import model_state_bytes
from lowmem.optim.release import release
from lowmem.training.contract.check import stepping
from tests.enrolled import unlike

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in unlike()]
VARIANTS += [
    ("galore", {"states": "int8"}),
    ("galore", {"states": "companded8", "projector": "svd"}),
    ("galore", {"on_refresh": "rotate"}),
    ("frugal", {"projector": "randk"}),
    ("adamw_8bit", {"states": "companded8"}),
    ("adamw", {"writer": "kahan"}),
    ("adamw", {"writer": "split"}),
]


class Net(nn.Module):
    """An embedding, two matrices (tall and wide), a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 80)
        self.layers = nn.ModuleList([nn.Linear(80, 144), nn.LayerNorm(144), nn.Linear(144, 80, bias=False)])

    def forward(self, tokens: Tensor) -> Tensor:
        first, norm, last = self.layers
        x = last(norm(first(self.embedding(tokens)).tanh()))
        return x.float().square().mean()


def build(
    device: str, dtype: torch.dtype, name: str, options: dict[str, Any], **hyper: Any
) -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net().to(device=device, dtype=dtype)
    known = lowmem.available()[name].options
    small = {"rank": 8, "update_proj_gap": 3}
    given = {key: value for key, value in small.items() if key in known} | options
    return model, lowmem.optimizer(model, name, lr=1e-2, weight_decay=0.01, **hyper, **given)


def tokens(device: str, step: int) -> Tensor:
    return torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(step)).to(device)


def advance(model: Net, optimizer: Any, step: int) -> None:
    batch = tokens(next(model.parameters()).device.type, step)
    optimizer.backward(lambda: model(batch), model)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_resume_bytes_and_guards(device: str, dtype: torch.dtype, name: str, options: dict[str, Any]) -> None:
    """Saved and loaded in mid-window: the same bits. Bytes as planned. Bad gradients ruin nothing."""
    model, optimizer = build(device, dtype, name, options)
    other, fresh = build(device, dtype, name, options)
    for step in range(4):
        advance(model, optimizer, step)
    assert optimizer.state_bytes() == model_state_bytes(optimizer.strategy, model, step=3)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True, map_location="cpu")
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    for step in range(4, 8):
        advance(model, optimizer, step)
        advance(other, fresh, step)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    if optimizer.strategy.source.needs_autograd:
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        before = [p.detach().clone() for p in model.parameters()]
        active = stepping(optimizer, model)  # a schedule lets others rest: they are not looked at
        optimizer.step()
        assert active
        assert optimizer.nonfinite() == sum(p.numel() for n, p in model.named_parameters() if n in active)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_release_is_the_ordinary_step(device: str, name: str, options: dict[str, Any]) -> None:
    if not lowmem.create(name).source.needs_autograd:
        pytest.skip("no gradients to release")
    ordinary, one = build(device, torch.bfloat16, name, options)
    released, two = build(device, torch.bfloat16, name, options)
    handle = release(two)
    for step in range(5):
        advance(ordinary, one, step)
        advance(released, two, step)
    handle.remove()
    assert all(torch.equal(p, q) for p, q in zip(ordinary.parameters(), released.parameters(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_squares_that_overflow_leave_everything_finite(
    device: str, name: str, options: dict[str, Any]
) -> None:
    """A gradient of 1e30 is finite, its square is not: state and weights stay finite."""
    if not lowmem.create(name).source.needs_autograd:
        pytest.skip("it does not step by p.grad")
    model, optimizer = build(device, torch.float32, name, options)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e30)
        optimizer.step()
    for p in model.parameters():
        assert torch.isfinite(p).all()
        held = [t for t in optimizer.state[p].values() if t.is_floating_point()]
        assert all(torch.isfinite(t).all() for t in held)


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_is_torchs(device: str) -> None:
    model, optimizer = build(device, torch.float32, "adamw", {})
    twin, _ = build(device, torch.float32, "adamw", {})
    truth = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(20):
        advance(model, optimizer, step)
        twin(tokens(device, step)).backward()
        truth.step()
        truth.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_step_is_the_same_as_on_the_cpu(device: str, name: str, options: dict[str, Any]) -> None:
    """From the same gradients: random streams, codecs and bases do not depend on the device."""
    if not lowmem.create(name).source.needs_autograd:
        pytest.skip("probes differ in the last bit of a loss")
    model, optimizer = build(device, torch.float32, name, options)
    twin, truth = build("cpu", torch.float32, name, options)
    for step in range(2):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad = q.grad.to(device)
        optimizer.step()
        truth.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        off = (p.detach().cpu() - q.detach()).abs() > 1e-4
        assert off.float().mean() < 0.01  # a code or a coordinate at a boundary may fall either way


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_step_does_not_wait_for_the_device(device: str, name: str, options: dict[str, Any]) -> None:
    """No value is read on the host, except where a basis is found (library calls may)."""
    if not lowmem.create(name).source.needs_autograd:
        pytest.skip("two losses are read: that is the method")
    gap = {"update_proj_gap": 1000} if "update_proj_gap" in lowmem.available()[name].options else {}
    model, optimizer = build(device, torch.bfloat16, name, {**options, **gap})
    advance(model, optimizer, 0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with no_synchronisation(device):
        optimizer.step()


@pytest.mark.cuda
def test_compiled_kernels_on_a_gpu() -> None:
    """Compiled and eager steps agree."""
    model, optimizer = build("cuda", torch.bfloat16, "adamw_8bit", {}, compile="on")
    twin, eager = build("cuda", torch.bfloat16, "adamw_8bit", {}, compile="off")
    for step in range(3):
        advance(model, optimizer, step)
        advance(twin, eager, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.slow
def test_benchmark_on_a_gpu() -> None:
    from lowmem.recipes.benchmark import benchmark

    found = benchmark("cuda", rounds=3, quick=True)
    assert found["milliseconds"]["lowmem adamw"] > 0.0


@pytest.mark.cuda
def test_a_compiled_step_runs_on_the_current_stream() -> None:
    """A stream that is kept waiting writes the gradient: a kernel of another stream would not see it."""
    weights = [nn.Parameter(torch.ones(512, 1024, device="cuda")) for _ in range(2)]
    one, two = (lowmem.LowMemOptimizer([("w", w)], lowmem.create("adamw"), compile="on") for w in weights)
    for w in weights:
        w.grad = torch.zeros_like(w)
    for optimizer in (one, two):
        optimizer.step()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        weights[0].grad.fill_(1.0)
        one.step()
    side.synchronize()
    weights[1].grad.fill_(1.0)
    two.step()
    assert torch.equal(weights[0], weights[1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion"])
def test_a_large_tensor_is_one_kernel(name: str) -> None:
    """What a compiler makes of a step is not split, and all ages move by one kernel more."""
    from torch.profiler import ProfilerActivity, profile

    weights = [nn.Parameter(torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
    named = [(f"w{i}", w) for i, w in enumerate(weights)]
    optimizer = lowmem.LowMemOptimizer(named, lowmem.create(name), lr=1e-3, compile="on")
    for _ in range(3):
        for w in weights:
            w.grad = torch.ones_like(w)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            optimizer.step()
    there = [e.name for e in seen.events() if str(e.device_type).endswith("CUDA")]
    kernels = [name for name in there if not name.startswith("Mem")]
    assert len(weights) <= len(kernels) <= len(weights) + 1, kernels
