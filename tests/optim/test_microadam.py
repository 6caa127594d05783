"""MicroAdam where it must be another thing exactly: Adam, a conservation law, nothing at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.blocks import Dense
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.rules.compact.microadam import BLOCK, MicroAdam, packed, unpacked
from lowmem.optim.terms.changes import Unrelated
from lowmem.optim.terms.hyper import Hyper


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(w: Tensor, chunks: Chunks, step: int = 0) -> Hyper:
    return Hyper(step, "w", 0, 0.1, (0.9, 0.999), 1e-8, 0.0, Dense(w), chunks.advance_)


def drive(start: Tensor, grads: list[Tensor], compile: str = "off", **options: Any) -> tuple[Tensor, Any]:
    p = nn.Parameter(start.clone())
    numbers: dict[str, Any] = {key: options.pop(key) for key in ("lr", "eps", "betas") if key in options}
    strategy = lowmem.create("microadam", **options)
    optimizer = lowmem.LowMemOptimizer([("w", p)], strategy, **{"lr": 1e-2, **numbers}, compile=compile)
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("shape", [(7,), (70, 61), (3, 4096)])
def test_a_dense_window_that_forgets_nothing_is_adam(shape: tuple[int, ...]) -> None:
    """Gradients that bf16 holds exactly: nothing is rounded, nothing is owed."""
    start = normal(*shape, seed=1)
    grads = [normal(*shape, seed=10 + t).bfloat16().float() for t in range(6)]
    p = nn.Parameter(start.clone())
    adam = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0)
    for g in grads:
        p.grad = g.clone()
        adam.step()
    ours, state = drive(start, grads, density=1.0, window=6)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-5, atol=1e-6)
    assert not state["error.range"].any()


def decoded(state: dict[str, Tensor], bucket: int) -> tuple[Tensor, Tensor]:
    """What is owed and the unit of each element, element by element."""
    codes, span = state["error.codes"].tolist(), state["error.range"].float()
    values, units = [], []
    for block, row in enumerate(codes):
        for i in range(BLOCK):
            byte = row[i // 2]
            low, high = span[block, i // bucket].tolist()
            code = byte // 16 if i % 2 == 0 else byte % 16
            units.append((high - low) / 15)
            values.append(low + code * units[-1])
    return torch.tensor(values), torch.tensor(units)


@pytest.mark.parametrize("bucket", [64, 4096])
def test_what_is_not_taken_is_owed(bucket: int) -> None:
    """a = V + e, up to half a unit and the rounding of V and of the range to bf16."""
    grads = [normal(5000, seed=t) for t in range(4)]
    _, before = drive(torch.zeros(5000), grads[:3], bucket=bucket)
    owed, _ = decoded(before, bucket)
    _, after = drive(torch.zeros(5000), grads, bucket=bucket)
    left, unit = decoded(after, bucket)
    accumulated = owed.clone()
    accumulated[:5000] += grads[3]
    slot = (int(after["age"]) - 1) % 10
    taken = torch.zeros(2, BLOCK).scatter(1, after["index"][:, slot].long(), after["value"][:, slot].float())
    off = (accumulated - taken.view(-1) - left).abs()
    extreme = after["error.range"].float().abs().amax()
    assert (off <= unit / 2 + 2**-8 * (accumulated.abs() + extreme)).all()
    assert (taken != 0).sum() == 2 * 41
    for row, block in zip(taken, accumulated.view(2, BLOCK), strict=True):
        assert block[row != 0].abs().min() >= block[row == 0].abs().max()


def test_the_rest_survives_packing_within_half_a_unit() -> None:
    rest = normal(3, BLOCK, seed=4)
    rest[1] = 1.00390625 * rest[1].abs() + 1000.0  # bf16 rounds lo up: codes below 0 would wrap around
    rest[2] = 3.0
    codes, span = packed(rest, 256)
    unit = ((span[..., 1].float() - span[..., 0].float()) / 15).repeat_interleave(256, 1)
    slack = 2**-8 * rest.abs().amax(1, keepdim=True)
    assert ((unpacked(codes, span) - rest).abs() <= unit / 2 + slack).all()
    assert torch.equal(unpacked(codes, span)[2], rest[2])
    assert torch.equal(*packed(torch.zeros(1, BLOCK), 64)[1].unbind(-1))


def test_bytes_are_the_closed_form() -> None:
    for shape, options in [
        ((1,), {}),
        ((61, 67), {"window": 3}),
        ((32000, 4096), {"bucket": 64, "density": 0.02}),
    ]:
        rule = MicroAdam(**options)
        blocks = -(-torch.Size(shape).numel() // BLOCK)
        kept = {0.01: 41, 0.02: 82}[rule.density]
        expected = blocks * (2048 + 4 * BLOCK // rule.bucket + 4 * rule.window * kept) + 4
        assert lowmem.state_bytes(lowmem.create("microadam", **options), shape) == expected


def test_the_window_is_counted_by_the_tensor_not_by_the_host() -> None:
    """A parameter that sits out some steps fills its window row by row."""
    p, q = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
    optimizer = lowmem.LowMemOptimizer([("p", p), ("q", q)], lowmem.create("microadam", window=3), lr=0.1)
    for step in range(6):
        p.grad = normal(64, seed=step)
        q.grad = normal(64, seed=step) if step % 2 else None
        optimizer.step()
    _, alone = drive(torch.zeros(64), [normal(64, seed=step) for step in (1, 3, 5)], window=3)
    assert all(torch.equal(optimizer.state[q][key], value) for key, value in alone.items())


def test_a_refused_step_leaves_the_state() -> None:
    rule, chunks = MicroAdam(), Chunks()
    low = normal(50, 100)
    state = rule.init(low)
    chunks.advance_(rule, low.clone(), state, hyper(low, chunks), torch.tensor(True))
    before = {key: value.clone() for key, value in state.items()}
    direction = normal(50, 100, seed=2)
    chunks.advance_(rule, direction, state, hyper(low, chunks), torch.tensor(False))
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert not direction.any()
    assert int(state["age"]) == 1


def test_chunks_do_not_matter() -> None:
    start, grads = normal(3, 100_000), [normal(3, 100_000, seed=t) for t in range(3)]
    results = []
    for most in (1 << 18, BLOCK):
        rule = dataclasses.replace(MicroAdam(), chunk=most)
        strategy = dataclasses.replace(lowmem.create("microadam"), rules={"matrix": rule, "other": rule})
        p = nn.Parameter(start.clone())
        optimizer = lowmem.LowMemOptimizer([("w", p)], strategy, lr=1e-2)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        results.append((p.detach(), optimizer.state[p]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_asking_for_compilation_changes_nothing() -> None:
    start, grads = normal(70, 70), [normal(70, 70, seed=t) for t in range(3)]
    assert torch.equal(drive(start, grads, "on")[0], drive(start, grads, "off")[0])


@pytest.mark.parametrize("size", [1e-30, 1e25, 3e38])
def test_numbers_at_the_end_of_fp32_stay_numbers(size: float) -> None:
    grads = [size * normal(5000, seed=t).clamp(-1, 1) for t in range(12)]
    w, state = drive(torch.zeros(5000), grads, eps=0.0)
    assert torch.isfinite(w).all()
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert float(w.abs().max()) > 1e-3


def test_what_is_owed_does_not_outlive_a_reset() -> None:
    rule, chunks = MicroAdam(), Chunks()
    low = normal(50, 100)
    state = rule.init(low)
    hp = hyper(low, chunks)
    chunks.advance_(rule, low.clone(), state, hp, torch.tensor(True))
    kept = {key: value.clone() for key, value in state.items()}
    rule.rebase_(state, Unrelated(torch.tensor(False)), (50, 100), hp)
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    rule.rebase_(state, Unrelated(torch.tensor(True)), (50, 100), hp)
    assert all(torch.equal(state[key], value) for key, value in rule.init(low).items())


@pytest.mark.parametrize("kind", ["keep", "rotate"])
def test_a_window_belongs_to_one_basis(kind: str) -> None:
    with pytest.raises(UserError, match="reset"):
        MicroAdam().check_rebase(kind)
    MicroAdam().check_rebase("reset")


@pytest.mark.parametrize("options", [{"bucket": 3}, {"bucket": 8192}, {"density": 0.0}, {"window": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        lowmem.create("microadam", **options)
