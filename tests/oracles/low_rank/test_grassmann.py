"""Bases that are tracked, walk, jump or turn random, against transcriptions of their papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.count import state_bytes, workspace_bytes
from lowmem.optim.contract import Projector
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments, coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.dense import Find, Orthonormal
from lowmem.optim.projectors.grassmann import Track, Walk
from lowmem.optim.projectors.random import Drawn, Switch
from lowmem.optim.residuals.rest import ScaledRest
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.hyper import Hyper
from lowmem.sources import Backprop
from tests.oracles.low_rank import reference_grassmann as reference
from tests.oracles.low_rank.test_subspaces import (
    BETAS,
    EPS,
    LR,
    normal,
    optimizer_of,
    steps,
    through_a_checkpoint,
)

GAP, RANK = 3, 3
SIDES = ["left", "right"]
Turn = Callable[[Tensor, Tensor, Hyper], Tensor]


def basis_of(optimizer: lowmem.LowMemOptimizer, p: nn.Parameter) -> Tensor:
    return optimizer.state[p]["projector.basis"].double()


def hyper(optimizer: lowmem.LowMemOptimizer, p: nn.Parameter) -> Hyper:
    return optimizer.hyper(p, first=not optimizer.state.get(p))


def of_side(x: Tensor, side: str) -> Tensor:
    return x if side == "left" else x.mT.contiguous()


def uniform(hp: Hyper, size: tuple[int, int], gap: int = 1) -> Tensor:
    q, r = torch.linalg.qr(hp.gaussian(size, "basis", gap).double())
    return q * r.diagonal().sign()


def tracked(s: Tensor, g: Tensor, hp: Hyper) -> Tensor:
    return reference.tracked(s, g, 0.7)


def walked(s: Tensor, g: Tensor, hp: Hyper) -> Tensor:
    return reference.geodesic(s, hp.gaussian((s.shape[0], s.shape[1]), "walk").double(), 0.4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("find", "turn"), [(Track(0.7), tracked), (Walk(0.4), walked)])
def test_a_basis_moves_along_the_geodesic_and_the_step_follows(find: Find, turn: Turn, side: str) -> None:
    """Projection-aware moments and recovery scaling, on both sides of the gradient."""
    projector = Orthonormal(Frame(RANK), find, GAP)
    rule = Subspace(projector, coded(Adam()), ScaledRest(), on_refresh="rotate", scale=0.25)
    start = normal(6, 12)
    optimizer, p = optimizer_of(rule, of_side(start, side))
    truth = reference.Recovering(start.double(), reference.AwareAdam(BETAS, EPS), LR, 0.25, 1.01)
    basis, moved = torch.zeros(()), 0
    for t, g in enumerate(steps((6, 12), 11)):
        hp = hyper(optimizer, p)
        if t > 0 and hp.due(GAP):
            basis, moved = turn(basis, g.double(), hp), moved + 1
        p.grad = of_side(g, side)
        optimizer.step()
        basis = basis if t else basis_of(optimizer, p)
        torch.testing.assert_close(basis_of(optimizer, p), basis, rtol=0, atol=2e-6)
        expected = of_side(truth.step(g.double(), basis), side)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=5e-6)
    assert moved >= 3


@pytest.mark.parametrize("side", SIDES)
def test_grass_jump_draws_its_basis_and_holds_none(side: str) -> None:
    rule = Subspace(Drawn(Frame(RANK), GAP), coded(Adam()), ScaledRest(), on_refresh="rotate", scale=0.25)
    start, bases = normal(6, 12), set()
    optimizer, p = optimizer_of(rule, of_side(start, side))
    truth = reference.Recovering(start.double(), reference.AwareAdam(BETAS, EPS), LR, 0.25, 1.01)
    for g in steps((6, 12), 11):
        basis = uniform(hyper(optimizer, p), (6, RANK), GAP)
        bases.add(float(basis.sum()))
        p.grad = of_side(g, side)
        optimizer.step()
        expected = of_side(truth.step(g.double(), basis), side)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=5e-6)
    assert len(bases) in (4, 5)
    assert not any(key.startswith("projector") for key in optimizer.state[p])


@dataclass(frozen=True)
class Average(Elementwise):
    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment()}
    ages: ClassVar[bool] = False

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        return {"exp_avg": m["exp_avg"] + (1 - BETAS[0]) * (g - m["exp_avg"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        return m["exp_avg"]


class Averaged(reference.AwareAdam):
    """Momentum alone: what GoLore is proved for, with M <- P_new' P_old M at a refresh."""

    def change(self, c: Tensor) -> None:
        self.m = None if self.m is None else c @ self.m

    def direction(self, r: Tensor) -> Tensor:
        b1 = self.betas[0]
        self.m = (1 - b1) * r + (0.0 if self.m is None else b1 * self.m)
        return self.m


@pytest.mark.parametrize("side", SIDES)
def test_golore_turns_random_and_its_momentum_stays_projected(side: str) -> None:
    """The released code uses a projected momentum for one step and then the old one again."""
    rule = Subspace(Orthonormal(Frame(RANK), Switch(5), GAP), coded(Average()), on_refresh="rotate")
    start, random = normal(6, 12), 0
    optimizer, p = optimizer_of(rule, of_side(start, side))
    truth = reference.Recovering(start.double(), Averaged(BETAS, EPS), LR, 1.0, None)
    for t, g in enumerate(steps((6, 12), 14)):
        hp = hyper(optimizer, p)
        p.grad = of_side(g, side)
        optimizer.step()
        basis = basis_of(optimizer, p)
        if t >= 5 and hp.due(GAP):
            torch.testing.assert_close(basis, uniform(hp, (6, RANK)), rtol=0, atol=2e-6)
            random += 1
        expected = of_side(truth.step(g.double(), basis), side)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=5e-6)
    assert random >= 2


def test_a_tracked_basis_moves_as_far_on_either_side() -> None:
    """The released code's tangent on the right is zero: those bases stay where they began."""
    far = []
    gradients = steps((6, 12), 2)
    for side in SIDES:
        optimizer, p = optimizer_of(
            Subspace(Orthonormal(Frame(RANK), Track(), 1), coded(Adam())), of_side(normal(6, 12), side)
        )
        bases = []
        for g in gradients:
            p.grad = of_side(g, side)
            optimizer.step()
            bases.append(basis_of(optimizer, p))
        far.append(float((bases[1] - bases[0]).norm()))
    assert far[0] > 0.05
    assert math.isclose(*far, rel_tol=1e-4)
    released = reference.released_tangent_on_the_right(bases[0], gradients[1].double().mT)
    assert float(released.norm()) < 1e-4 * float(gradients[1].norm()) ** 2


@pytest.mark.parametrize("find", [Track(), Walk(1.0)])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (6, 6), (5, 1)])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_basis_stays_orthonormal(find: Find, shape: tuple[int, int], rank: int) -> None:
    optimizer, p = optimizer_of(
        Subspace(Orthonormal(Frame(rank), find, 1), coded(Adam()), ScaledRest(), on_refresh="rotate"),
        normal(*shape),
    )
    for g in steps(shape, 40):
        p.grad = g
        optimizer.step()
    basis = basis_of(optimizer, p)
    eye = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=2e-6)
    assert p.isfinite().all()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_tracked_basis_does_not_mind_the_size_of_gradients(size: float) -> None:
    ends = []
    for factor in (1.0, size):
        optimizer, p = optimizer_of(
            Subspace(Orthonormal(Frame(RANK), Track(), 1), coded(Adam())), normal(6, 12)
        )
        for g in steps((6, 12), 4):
            p.grad = g * factor
            optimizer.step()
        ends.append(basis_of(optimizer, p))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_tracked_basis_stays_where_a_gradient_tells_nothing(bad: float) -> None:
    rule = Subspace(Orthonormal(Frame(RANK), Track(), 1), coded(Adam()), on_refresh="rotate")
    optimizer, p = optimizer_of(rule, normal(6, 12))
    p.grad = normal(6, 12, seed=1)
    optimizer.step()
    before = basis_of(optimizer, p)
    p.grad = torch.full((6, 12), bad)
    optimizer.step()
    assert torch.equal(basis_of(optimizer, p), before)
    assert p.isfinite().all()


@pytest.mark.parametrize("projector", [Orthonormal(Frame(RANK), Track(), GAP), Drawn(Frame(RANK), GAP)])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_what_resumes_ends_where_it_would_have(projector: Projector, stop: int) -> None:
    """Between refreshes and on one, bit for bit; and what is planned is what is held."""
    rule = Subspace(projector, coded(Adam()), ScaledRest(), on_refresh="rotate")
    resumed, p = through_a_checkpoint(rule, (6, 12), 9, stop)
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    held = sum(x.nbytes for x in resumed.state[p].values())
    basis = 4 * 6 * RANK if isinstance(projector, Orthonormal) else 0
    assert state_bytes(strategy, (6, 12)) == held == basis + 8 * RANK * 12 + 8


def test_what_is_out_of_range_is_refused() -> None:
    for make in (lambda: Track(0.0), lambda: Walk(2.0), lambda: Switch(-1)):
        with pytest.raises(UserError):
            make()


WIDE = Frame(512)
BOUNDED: dict[str, Callable[[int], Projector]] = {
    "track": lambda gap: Orthonormal(WIDE, Track(), gap),
    "walk": lambda gap: Orthonormal(WIDE, Walk(), gap),
    "jump": lambda gap: Drawn(WIDE, gap),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("shape", [(2048, 5504), (5504, 2048)])
@pytest.mark.parametrize("gap", [1, 200])
def test_a_step_takes_no_more_than_is_declared(name: str, shape: tuple[int, int], gap: int) -> None:
    """At a refresh, which a gap of 1 makes of every step, 12 s r bytes more."""
    rule = Subspace(BOUNDED[name](gap), coded(Adam()), ScaledRest(), on_refresh="rotate")
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    taken = workspace_bytes(strategy, shape, torch.bfloat16, "matrix", refresh=False)
    assert taken <= rule.scratch(shape) + 12 * 512 * 2048 * (gap == 1), f"{taken / 2**20:.0f} MiB"
