"""Rules with factored second moments: their papers in double precision, and what the papers promise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from tests.oracles import drive
from tests.oracles.factored import reference_factored as reference

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
        ("adam_mini", {}, 4 * 600 + 4 * 20 + 4),
        ("adamw_4bit_rank1", {}, 300 + 4 * 5 + 300 + 4 * 50 + 4),
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


def test_vectors_beside_4_bits_under_rows_and_columns_stay_fp32() -> None:
    assert lowmem.state_bytes(lowmem.create("adamw_4bit_rank1"), (5000,), role="vector") == 8 * 5000 + 4


@pytest.mark.parametrize("name", ["came", "sm3", "adam_mini", "adamw_4bit_rank1"])
def test_zeros_stand_still_and_what_is_not_finite_is_refused(name: str) -> None:
    start, g = torch.ones(6, 9), drive.gradients((6, 9), 1)[0]
    bad = g.clone()
    bad[2, 3] = torch.nan
    ends = drive.follow(name, start, [torch.zeros(6, 9), bad, g], hyper={"lr": 0.1})
    assert torch.equal(ends[0], start)
    assert torch.equal(ends[1], start)
    assert ends[2].isfinite().all()
    assert not torch.equal(ends[2], start)


@pytest.mark.parametrize(("shape", "blocks"), [((7, 11), 7), ((11, 7), 11), ((13,), 1)])
def test_adam_mini_is_the_paper(shape: tuple[int, ...], blocks: int) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 6)
    truth = reference.AdamMini(start, 1e-2, 0.1, (0.9, 0.99), blocks)
    ours = drive.follow("adam_mini", start, grads, hyper={**HYPER, "betas": (0.9, 0.99)})
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alike", [False, True])
def test_adam_mini_is_adamw_where_blocks_have_one_size(alike: bool) -> None:
    """Of one element, or with elements that differ by sign alone."""
    shape = (6, 9) if alike else (54, 1)
    start, grads = drive.start_of(shape), drive.gradients(shape, 6)
    grads = [g.sign() * g[:, :1].abs() for g in grads] if alike else grads
    theirs = nn.Parameter(start.clone())
    official = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for g, w in zip(grads, drive.follow("adam_mini", start, grads, hyper=HYPER), strict=True):
        theirs.grad = g.clone()
        official.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-6, atol=1e-7)


class Attention(nn.Module):
    """Two query heads for each key head, three rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 3
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)


def test_adam_mini_takes_queries_and_keys_by_heads() -> None:
    """Also after a resume into an optimizer that knows the names alone."""
    model = Attention()
    blocks = {"q_proj": 4, "k_proj": 2, "v_proj": 6}
    truth = {
        name: reference.AdamMini(getattr(model, name).weight.detach(), 1e-2, 0.0, (0.9, 0.999), count)
        for name, count in blocks.items()
    }
    optimizer = lowmem.optimizer(model, "adam_mini", lr=1e-2)
    for step in range(4):
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = lowmem.optimizer(list(model.named_parameters()), "adam_mini", lr=1e-2)
            optimizer.load_state_dict(saved)
        for seed, name in enumerate(blocks):
            weight = getattr(model, name).weight
            weight.grad = drive.gradients(weight.shape, 1, seed=10 * step + seed)[0]
        optimizer.step()
        for seed, name in enumerate(blocks):
            weight = getattr(model, name).weight.detach()
            expected = truth[name].step(drive.gradients(weight.shape, 1, seed=10 * step + seed)[0])
            torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 11), (12, 7), (1, 5)])
def test_adam_rank1_is_the_paper(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd rows share bytes of codes; they are stored in more than one block."""
    monkeypatch.setattr("lowmem.optim.codecs.rankone.BLOCK", 44)
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = reference.AdamRankOne(start, 1e-2, 0.1, (0.9, 0.99))
    hyper = {**HYPER, "betas": (0.9, 0.99)}
    ours = drive.follow("adamw_4bit_rank1", start, grads, hyper=hyper, states="fp32")
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


def test_adam_rank1_in_4_bits_is_near_adamw() -> None:
    """With loud columns, nearer than with scales of blocks."""
    grads = drive.gradients((64, 64), 6)
    loud = torch.ones(64, 64)
    loud[:, [5, 20, 50]] = 100.0
    exact, block, rank1 = (
        drive.follow(name, torch.zeros(64, 64), [g * loud for g in grads], hyper={"lr": 1e-2}, **options)[-1]
        for name, options in (
            ("adamw", {}),
            ("adamw", {"exp_avg_sq_states": "int4"}),
            ("adamw_4bit_rank1", {"states": "fp32"}),
        )
    )
    assert (rank1 - exact).norm() < 0.1 * exact.norm()
    assert (rank1 - exact).norm() < 0.2 * (block - exact).norm()
