"""The plain rule is torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.oracles import drive
from tests.oracles.dense.reference_adamw import AdamW

HYPERS: list[dict[str, Any]] = [
    {"lr": 1e-2},
    {"lr": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.1},
    {"lr": 1e-3, "betas": (0.0, 0.99), "eps": 1e-2},
    {"lr": 1e-2, "eps": 1e-15, "weight_decay": 1.0},
]
SHAPES = [(), (1,), (7,), (6, 9), (9, 6), (13, 1), (3, 4, 5), (2, 3, 3, 3)]


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("adamw")


@pytest.mark.parametrize("hyper", HYPERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", ["matrix", "other"])
def test_adamw_is_torchs(shape: tuple[int, ...], hyper: dict[str, Any], role: str) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 20)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], **{"weight_decay": 0.0, **hyper})
    ours = drive.follow("adamw", start, grads, role, hyper=hyper)
    for g, w in zip(grads, ours, strict=True):
        theirs.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=2e-6, atol=1e-7)


def test_a_zero_gradient_is_an_ordinary_one() -> None:
    """torch's AdamW moves on after the gradient has gone, and so do we."""
    grads = [*drive.gradients((5, 5), 3), *[torch.zeros(5, 5)] * 5]
    truth = AdamW(drive.start_of((5, 5)).double(), lr=0.1)
    for g, w in zip(grads, drive.follow("adamw", truth.w.float(), grads, hyper={"lr": 0.1}), strict=True):
        before = truth.w
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)
    assert (truth.w - before).abs().mean() > 1e-2


def test_lr_and_betas_may_change_between_steps() -> None:
    start, grads = drive.start_of((4, 6)), drive.gradients((4, 6), 8)
    theirs = nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    ours, params = drive.on_weights("adamw", {"w": start}, hyper={"lr": 1e-2, "weight_decay": 0.1})
    for i, g in enumerate(grads):
        for optimizer in (torchs, ours):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i)
            optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * (i % 2), 0.999)
        theirs.grad = g.clone()
        torchs.step()
        drive.step(ours, params, {"w": g})
    # torch corrects the bias with the betas of the moment, and so do we
    torch.testing.assert_close(params["w"].detach(), theirs.detach(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("writer", ["nearest", "kahan", "split", "stochastic"])
def test_bf16_weights_follow_the_fp64_truth_as_closely_as_the_writer_allows(writer: str) -> None:
    start, steps = drive.start_of((64, 64)).bfloat16(), 100
    grads = [torch.full((64, 64), -1.0)] * steps  # one sign: a step of lr, always the same way
    truth = AdamW(start.double(), lr=1e-5)
    for g in grads:
        truth.step(g)
    ours = drive.follow("adamw", start, grads, hyper={"lr": 1e-5}, writer=writer)[-1].double()
    ulp = 2.0 ** (truth.w.abs().log2().floor() - 7)
    off = (ours - truth.w).abs() / ulp
    if writer == "nearest":
        assert off.max() > 0.9  # what the others are for
    elif writer == "stochastic":
        assert off.max() < 100 * 1e-5 / float(ulp.min()) + 2
        mean_off = float((ours - truth.w).mean())
        spread = float(ulp.mean()) * 10 / (2 * 64)  # a hundred coin flips, 4096 weights
        assert abs(mean_off) < 5 * spread
    else:
        assert off.max() <= 1.01


def test_0d_and_empty_state_do_not_meet() -> None:
    """A scalar weight has one moment of one element."""
    optimizer, params = drive.on_weights("adamw", {"w": torch.tensor(0.5)}, hyper={"lr": 1e-2})
    drive.step(optimizer, params, {"w": torch.tensor(1.0)})
    assert float(params["w"].detach()) == pytest.approx(0.49)
