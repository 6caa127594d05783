"""ZO-AdaMU's directions: as the paper writes them, in its three phases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.source import Query
from lowmem.sources.directions import Perturbation
from lowmem.sources.mixed import Mixed
from tests.sources.tiny import Vector, drawn

TOTAL, EPS, LR = 40, 1e-2, 0.1


def shares(t: int) -> tuple[float, ...]:
    """a, b1, b2 written out from the paper's schedule, with a horizon for each."""
    first, last, found = TOTAL // 20, int(0.8 * TOTAL), []
    for speed in (1.0, 0.1, 1.5):
        done = min(max(t - first, 0), last - first)
        horizon = max(TOTAL - speed * (TOTAL - last) * done / (last - first), last - first)
        found.append(1.0 if t < first else 0.5 + 0.5 * math.cos(math.pi * done / horizon))
    return tuple(found)


def noise(t: int, part: tuple[int, ...], like: Tensor) -> Tensor:
    z = Perturbation("gaussian", (0, t, 0, 0, *part))
    return z.draw("weight", like, 0, like.numel()).view(like.shape).double()


def test_steps_are_the_papers_through_all_phases() -> None:
    """Written out in fp64: mixed directions, their second moment, and the mean that is carried."""
    model, g = Vector(6, 5), drawn(6, 5, seed=3)
    optimizer = lowmem.optimizer(model, "zo_adamu", lr=LR, eps_perturb=EPS, total_steps=TOTAL)
    w, mean = model.weight.detach().clone(), torch.zeros(6, 5, dtype=torch.float64)

    def at(x: Tensor) -> Tensor:
        return (x * g).tanh().sum()

    for t in range(TOTAL):
        a, b1, b2 = shares(t)
        fresh = a**0.5 * noise(t, (), w)
        other = mean + (1 - a) ** 0.5 * noise(t, (1,), w)
        d = b1 * fresh + (1 - b1) * other
        c = float((at(w + EPS * d) - at(w - EPS * d)) / (2 * EPS))
        w = w - LR * c * d / (b2 * fresh**2 + (1 - b2) * other**2 + 1e-8).sqrt()
        mean = math.copysign(1.0, c) * d
        optimizer.step(lambda: at(model()))
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-4, atol=1e-4)
        w = model.weight.detach().clone()  # one step at a time: differences of losses are amplified
        mean = optimizer.state[model.weight]["source.mean"].clone().double()
    assert shares(1) == (1.0, 1.0, 1.0)
    assert min(shares(TOTAL - 1)) < 0.1


def test_the_first_steps_are_of_one_size() -> None:
    """v = z^2 there: c d / sqrt(v) is c sign(z)."""
    model = Vector(64)
    before = model.weight.detach().clone()
    optimizer = lowmem.optimizer(model, "zo_adamu", lr=LR)
    optimizer.step(lambda: model().sum())
    moved = (model.weight.detach() - before).abs()
    torch.testing.assert_close(moved, moved.max().expand(64), rtol=1e-3, atol=0.0)


def test_a_slope_that_is_not_finite_leaves_the_mean() -> None:
    model = Vector(8)
    optimizer = lowmem.optimizer(model, "zo_adamu", lr=LR, total_steps=TOTAL)
    optimizer.step(lambda: model().sum())
    held = optimizer.state[model.weight]["source.mean"].clone()
    optimizer.step(lambda: model().sum() * math.nan)
    assert held.any()
    assert torch.equal(optimizer.state[model.weight]["source.mean"], held)


@pytest.mark.parametrize("total", [20, 1000, 20_000])
def test_shares_fall_from_one_and_stay(total: int) -> None:
    mixed = Mixed(total)
    for speed in (1.0, 0.1, 1.5):
        found = [mixed.share(t, speed) for t in range(0, total, max(1, total // 50))]
        assert found[0] == 1.0
        assert all(a >= b - 1e-12 and b >= 0.0 for a, b in itertools.pairwise(found))
        assert found[-1] == mixed.share(total * 4 // 5, speed)


@pytest.mark.parametrize("method", ["lozo", "sparse_mezo", "zo_adamu", "qzo"])
def test_directions_that_some_rows_do_not_give_are_refused_where_rows_are_spread(method: str) -> None:
    """What is held, or looked at, is not found by the index of an element; free directions are."""
    assert "take mezo or fzoo" in lowmem.create(method).source.unspread()
    assert not lowmem.create("mezo").source.unspread()
    assert not lowmem.create("fzoo").source.unspread()


def test_a_schedule_that_lets_tensors_go_is_refused() -> None:
    with pytest.raises(UserError, match="schedule=blocks would let go; take schedule=always"):
        lowmem.create("zo_adamu", schedule="blocks")
    assert Mixed().direction("gaussian", Query(0, 5), 0).name == (0, 5, 0, 0)
