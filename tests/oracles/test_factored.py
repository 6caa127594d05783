"""Rules with factored second moments: their papers in double precision, and what the papers promise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from tests.oracles import drive
from tests.oracles import reference_factored as reference

HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (1, 5), (13,)])
def test_came_is_the_paper(shape: tuple[int, ...]) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 6)
    truth = reference.CAME(start, 1e-2, 0.1, (0.9, 0.99, 0.999))
    ours = drive.follow("came", start, grads, hyper={**HYPER, "betas": (0.9, 0.99)}, beta3=0.999)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=2e-6)


def test_came_in_8_bits_stays_near() -> None:
    start, grads = drive.start_of((16, 32)), drive.gradients((16, 32), 8)
    exact, coded = (
        drive.follow("came", start, grads, hyper={"lr": 1e-2}, states=states)[-1]
        for states in ("fp32", "int8")
    )
    assert (coded - exact).norm() < 0.02 * (exact - start).norm()


def test_the_first_step_of_came_is_as_long_as_it_says() -> None:
    """(1 - beta1) / (beta1 sqrt(1 - beta3)) for gradients of one size, which no factor falsifies."""
    g = drive.gradients((6, 9), 1)[0].sign()
    moved = drive.follow("came", torch.zeros(6, 9), [g], hyper={"lr": 1.0, "betas": (0.9, 0.999)})[0]
    torch.testing.assert_close(moved, -g * (0.1 / (0.9 * 0.01)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(7, 11), (1100, 1000)])
def test_sm3_is_the_paper(shape: tuple[int, int], momentum: float) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = reference.SM3(start, 1e-2, 0.1, momentum)
    ours = drive.follow("sm3", start, grads, hyper=HYPER, momentum=momentum)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


def test_sm3_of_a_vector_is_adagrad() -> None:
    start, grads = drive.start_of((13,)), drive.gradients((13,), 6)
    theirs = nn.Parameter(start.clone())
    official = torch.optim.Adagrad([theirs], lr=1e-2, eps=0.0)
    for g, w in zip(grads, drive.follow("sm3", start, grads, hyper={"lr": 1e-2}), strict=True):
        theirs.grad = g.clone()
        official.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_sm3_bounds_the_sums_of_squares_and_never_shrinks() -> None:
    grads, held = drive.gradients((6, 9), 8), []

    def watch(optimizer: Any, p: Tensor) -> None:
        held.append([optimizer.state[p][f"accumulator.{key}"].clone() for key in ("row", "col")])

    drive.follow("sm3", torch.zeros(6, 9), grads, watch=watch, hyper={"lr": 1e-2})
    bounds = [torch.minimum(row[:, None], column) for row, column in held]
    for before, after in itertools.pairwise(bounds):
        assert (after >= before).all()
    assert (bounds[-1] >= torch.stack(grads).square().sum(0) * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("came", {}, 4 * 600 + 8 * 50),
        ("came", {"states": "int8"}, 600 + 4 * 3 + 8 * 50),
        ("sm3", {}, 4 * 50),
        ("sm3", {"momentum": 0.9, "states": "bf16"}, 2 * 600 + 4 * 50),
    ],
)
def test_what_is_held(name: str, options: dict[str, Any], size: int) -> None:
    """On meta and in fact; a stack is so many matrices."""
    strategy = lowmem.create(name, **options)
    held: list[int] = []

    def watch(optimizer: Any, p: Tensor) -> None:
        held.append(sum(x.nbytes for x in optimizer.state[p].values()))

    for shape, count in (((20, 30), 1), ((3, 20, 30), 3)):
        drive.follow(name, torch.zeros(shape), [torch.ones(shape)], watch=watch, hyper={"lr": 0.1}, **options)
        assert lowmem.state_bytes(strategy, shape) == held.pop() == count * size


@pytest.mark.parametrize("name", ["came", "sm3"])
def test_zeros_stand_still_and_what_is_not_finite_is_refused(name: str) -> None:
    start, g = torch.ones(6, 9), drive.gradients((6, 9), 1)[0]
    bad = g.clone()
    bad[2, 3] = torch.nan
    ends = drive.follow(name, start, [torch.zeros(6, 9), bad, g], hyper={"lr": 0.1})
    assert torch.equal(ends[0], start)
    assert torch.equal(ends[1], start)
    assert ends[2].isfinite().all()
    assert not torch.equal(ends[2], start)
