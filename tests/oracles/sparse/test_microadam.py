"""MicroAdam against a plain transcription of its paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import drive
from tests.oracles.sparse.reference_microadam import BLOCK, MicroAdam, stationary_gain

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
SHAPES = [(1,), (77,), (64, 64), (5000,), (50, 130), (3, 4096)]


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("microadam")


def follow(start: Tensor, grads: list[Tensor], **options: Any) -> list[Tensor]:
    hyper, watch = options.pop("hyper", HYPER), options.pop("watch", None)
    return drive.follow("microadam", start, grads, watch=watch, hyper=hyper, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_microadam_is_the_algorithm(shape: tuple[int, ...], weight_decay: float) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 14)
    hyper = {**HYPER, "weight_decay": weight_decay}
    truth = MicroAdam(start, **hyper)
    for t, (g, w) in enumerate(zip(grads, follow(start, grads, hyper=hyper), strict=True)):
        expected = truth.step(g)
        # one code of the feedback that falls the other way by rounding is worth at most one unit, rarely more
        off = (w - expected).abs() > 1e-5
        assert float(off.float().mean()) <= 2e-3, t


CHANGED: list[dict[str, Any]] = [{"betas": (0.5, 0.999)}, {"betas": (0.9, 0.8)}, {"eps": 1e-2}, {"lr": 3e-2}]
OPTIONS: list[dict[str, Any]] = [{"window": 3}, {"density": 0.05}, {"bucket": 64}]


@pytest.mark.parametrize("changed", [*CHANGED, *OPTIONS], ids=str)
def test_every_number_means_what_it_means_in_the_paper(changed: dict[str, Any]) -> None:
    shape = (50, 130)
    start, grads = drive.start_of(shape), drive.gradients(shape, 14)
    options, hyper = (changed, HYPER) if changed in OPTIONS else ({}, {**HYPER, **changed})
    truth, plain = MicroAdam(start, **hyper, **options), MicroAdam(start, **HYPER)
    for t, (g, w) in enumerate(zip(grads, follow(start, grads, hyper=hyper, **options), strict=True)):
        expected, other = truth.step(g), plain.step(g)
        off = (w - expected).abs() > 1e-5
        assert float(off.float().mean()) <= 2e-3, t
    assert float(((w - other).abs() > 1e-5).float().mean()) > 0.02  # another number is seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_window_moves(dtype: torch.dtype) -> None:
    start = drive.start_of((3, 5000)).to(dtype)
    for steps in (1, 3):
        grads = drive.gradients((3, 5000), steps)
        moved = follow(start, grads)[-1] != start
        kept = math.ceil(0.01 * BLOCK) * -(-15_000 // BLOCK)
        assert 0 < int(moved.sum()) <= steps * kept


def test_untouched_weights_change_by_decay_alone() -> None:
    start, grads = drive.start_of((64, 64)), drive.gradients((64, 64), 2)
    hyper = {**HYPER, "weight_decay": 0.5}
    truth = MicroAdam(start, **hyper)
    ours = follow(start, grads, hyper=hyper)[-1]
    for g in grads:
        truth.step(g)
    untouched = ~truth.support()
    torch.testing.assert_close(ours[untouched], start[untouched] * (1 - 5e-3) ** 2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("t", [10, 100])
def test_the_step_of_a_constant_coordinate_grows_as_published(t: int) -> None:
    g = torch.zeros(4096)
    g[5] = 1.0
    ours = follow(torch.zeros(4096), [g] * t, hyper={**HYPER, "lr": 2.0**-10})
    last = (ours[-2] - ours[-1])[5] * 2.0**10
    assert float(last) == pytest.approx(stationary_gain(t, 10, (0.9, 0.999)), rel=1e-3)


def test_what_is_not_taken_comes_later() -> None:
    """Two coordinates and room for one: without error feedback the smaller would never move."""
    g = torch.zeros(4096)
    g[:82] = 1.0
    g[41:82] = 0.6  # 41 are kept in each block of 4096
    ours = follow(torch.zeros(4096), [g] * 6)
    assert (ours[0][41:82] == 0).all()
    assert (ours[-1][:82] != 0).all()
    assert (ours[-1][82:] == 0).all()


def test_state_is_nine_tenths_of_a_byte() -> None:
    d = 1 << 20
    size = drive.lowmem.state_bytes(drive.lowmem.create("microadam"), (d,))
    kept = 41 * d // BLOCK
    assert d // 2 + 4 * 10 * kept <= size <= 0.92 * d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_trains_and_indices_keep_theirs(dtype: torch.dtype) -> None:
    seen: dict[str, Tensor] = {}
    start, grads = drive.start_of((64, 65)).to(dtype), drive.gradients((64, 65), 12)
    ours = follow(start, grads, watch=lambda o, p: seen.update(o.state[p]))
    assert torch.isfinite(ours[-1]).all()
    assert not torch.equal(ours[-1], start)
    assert torch.int16 in {v.dtype for v in seen.values()}


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_gradients_stay_finite(scale: float) -> None:
    ours = follow(torch.zeros(5000), drive.gradients((5000,), 12, scale=scale))
    assert all(torch.isfinite(w).all() for w in ours)
    assert (ours[-1] != 0).any()


def test_equal_gradients_leave_a_bucket_without_a_range() -> None:
    ours = follow(torch.zeros(8192), [torch.zeros(8192), torch.full((8192,), 2.0), torch.zeros(8192)])
    assert all(torch.isfinite(w).all() for w in ours)
