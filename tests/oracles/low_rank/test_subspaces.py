"""Parts that look beyond a fixed subspace, against transcriptions of their papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.count import model_state_bytes, workspace_bytes
from lowmem.optim.blocks import Dense
from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import coded
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.coordinate import Elements
from lowmem.optim.projectors.dct import DCT
from lowmem.optim.projectors.dense import Orthonormal
from lowmem.optim.projectors.online import Online
from lowmem.optim.projectors.random import Gaussian
from lowmem.optim.residuals.rest import Rest, ScaledGradient, ScaledRest
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.rules.normalised.muon import Muon
from lowmem.optim.schedules.turns import Layers
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.hyper import Hyper
from lowmem.sources import Backprop
from tests.oracles.low_rank import reference_subspaces as reference

LR, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-8
SHAPES = [(6, 12), (12, 6)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(rule: AnyRule, w: Tensor, **hyper: Any) -> tuple[lowmem.LowMemOptimizer, nn.Parameter]:
    p = nn.Parameter(w.clone())
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    numbers = {"lr": LR, "betas": BETAS, "eps": EPS, **hyper}
    return lowmem.LowMemOptimizer([{"params": [("w", p)], "role": "matrix"}], strategy, **numbers), p


def steps(shape: tuple[int, int], count: int) -> list[Tensor]:
    """Gradients of changing size."""
    return [normal(*shape, seed=t + 1) * (1 + 3 * (t % 3)) for t in range(count)]


def through_a_checkpoint(
    rule: AnyRule, shape: tuple[int, int], count: int, stop: int
) -> tuple[lowmem.LowMemOptimizer, nn.Parameter]:
    """An optimizer that goes on from a state dict after `stop` steps: the bits of one that goes through."""
    (through, p), (first, q) = (optimizer_of(rule, normal(*shape)) for _ in range(2))
    for t, g in enumerate(steps(shape, count)):
        if t == stop:
            second, fresh = optimizer_of(rule, q.detach())
            second.load_state_dict(first.state_dict())
            first, q = second, fresh
        for optimizer, weight in ((through, p), (first, q)):
            weight.grad = g.clone()
            optimizer.step()
    assert torch.equal(p.detach(), q.detach())
    return first, q


def near(got: Tensor, expected: Tensor, start: Tensor, share: float) -> None:
    """The same up to a share of the way that was gone."""
    off = (got.double() - expected).norm() / (expected - start.double().view_as(expected)).norm()
    assert off <= share, f"off by {off:.2g} of the way"


def adam() -> reference.Adam:
    return reference.Adam(BETAS, EPS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [0.0, 1.01])
def test_fira(shape: tuple[int, int], limit: float) -> None:
    rule = Subspace(
        Orthonormal(Frame(3), update_proj_gap=1000), coded(Adam()), ScaledRest(limit=limit), scale=0.25
    )
    start = normal(*shape)
    optimizer, p = optimizer_of(rule, start)
    truth = reference.Fira(start.double(), adam(), LR, 0.25, limit or 1e9)
    for g in steps(shape, 8):
        p.grad = g
        optimizer.step()
        basis = optimizer.state[p]["projector.basis"].double()
        expected = truth.step(g.double(), basis, left=shape[0] < shape[1])
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [0.0, 1.01])
def test_apollo(shape: tuple[int, int], limit: float) -> None:
    """The sketch changes after three steps, and is nowhere held."""
    projector = Gaussian(Frame(3), 3)
    start = normal(*shape)
    rule = Subspace(projector, coded(Adam()), ScaledGradient(limit=limit))
    optimizer, p = optimizer_of(rule, start)
    truth = reference.Apollo(start.double(), adam(), LR, 1.0, limit or 1e9)
    sketches = []
    for step, g in enumerate(steps(shape, 8)):
        hp = Hyper(step, "w", 0, LR, BETAS, EPS, 0.0, Dense(p.detach()), Chunks().advance_)
        sketches.append(projector.opened({}, hp)["basis"].double())
        p.grad = g
        optimizer.step()
        expected = truth.step(g.double(), sketches[-1], left=shape[0] < shape[1])
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=5e-6)
    assert len({float(sketch.sum()) for sketch in sketches}) in (3, 4)
    assert not any(key.startswith("projector") for key in optimizer.state[p])


@pytest.mark.parametrize(("penalty", "own"), [(0.0, False), (0.1, False), (0.1, True)])
def test_online_subspace(penalty: float, own: bool) -> None:
    """Descent, or Adam on the same slope, whose moments are part of the state and counted."""
    shape, start = (6, 12), normal(6, 12)
    gradients = steps(shape, 8)
    first, q = optimizer_of(Subspace(Orthonormal(Frame(3)), coded(Adam())), start)
    q.grad = gradients[0]
    first.step()  # the same start: a power iteration on the first gradient
    basis = first.state[q]["projector.basis"].double()
    rule = coded(Adam()) if own else coded(SGD())
    optimizer, p = optimizer_of(Subspace(Online(Frame(3), 5.0, penalty, rule), coded(Adam())), start)
    truth = reference.OnlineSubspace(start.double(), basis, adam(), LR, 5.0, penalty, adam() if own else None)
    for g in gradients:
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), truth.step(g.double()), rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["projector.basis"].double(), truth.p, rtol=0, atol=2e-6)
    held = sum(x.nbytes for x in optimizer.state[p].values())
    assert held == 4 * 6 * 3 + 8 * 3 * 12 + 4 + (8 * 6 * 3 + 4) * own


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_dct(side: str, states: str) -> None:
    """Columns come and go every second step; each has its own moments and age."""
    rule = Subspace(DCT(Frame(4, side), 2), coded(Adam(), states), on_refresh="rotate")
    start, gradients = normal(8, 12), steps((8, 12), 9)
    optimizer, p = optimizer_of(rule, start if side == "right" else start.mT.contiguous())
    truth = reference.DCTAdam(start.double(), 4, BETAS, EPS, LR)
    ages = []
    for g in gradients:
        due = optimizer.hyper(p, first=not optimizer.state.get(p)).due(2)
        p.grad = g if side == "right" else g.mT.contiguous()
        optimizer.step()
        expected = truth.step(g.double(), due)
        got = p.detach() if side == "right" else p.detach().mT
        near(got, expected, start, {"fp32": 3e-5, "bf16": 0.01, "int8": 0.04}[states])
        ages.append(optimizer.state[p]["inner.age"].tolist())
        assert ages[-1] == [t for _, _, t in truth.columns.values()]
    assert any(len(set(age)) > 1 for age in ages)


def test_the_cosines_are_held_once_and_counted() -> None:
    rule = Subspace(DCT(Frame(4)), coded(Adam()))
    model = nn.Sequential(
        nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False), nn.Linear(32, 32, bias=False)
    )
    strategy = Strategy(rules={"matrix": rule, "other": coded(Adam())}, source=Backprop())
    optimizer = lowmem.LowMemOptimizer(list(model.named_parameters()), strategy)
    optimizer.init_state()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert optimizer.state_bytes() == held + 4 * 32 * 32
    assert model_state_bytes(strategy, model) == optimizer.state_bytes()


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (40, 40)])
@pytest.mark.parametrize(("states", "close"), [("fp32", 5e-5), ("bf16", 0.02), ("int8", 0.06)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(shape: tuple[int, int], states: str, close: float, nesterov: bool) -> None:
    start = normal(*shape)
    optimizer, p = optimizer_of(Muon.of(states, nesterov=nesterov), start, weight_decay=0.1)
    truth = reference.Muon(start.double(), LR, 0.95, nesterov, 0.1)
    for g in steps(shape, 6):
        p.grad = g
        optimizer.step()
        near(p.detach(), truth.step(g.double()), start, close)


def test_muon_leaves_what_is_not_finite_and_does_not_mind_sizes() -> None:
    start = normal(6, 12)
    ends = []
    for size in (1.0, 1e-25, 1e25):
        optimizer, p = optimizer_of(Muon(), start)
        p.grad = normal(6, 12, seed=1) * size
        optimizer.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-5)
    before, momentum = p.detach().clone(), optimizer.state[p]["momentum"].clone()
    p.grad = torch.full((6, 12), torch.inf)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["momentum"], momentum)
    assert optimizer.nonfinite() == 72


def test_muon_inside_a_subspace() -> None:
    """At full rank, in any orthonormal basis, it is Muon."""
    start, wide = normal(12, 6), Muon(scaling="aspect")
    inside = Subspace(Orthonormal(Frame(6), update_proj_gap=1000), wide)
    (one, p), (two, q) = optimizer_of(inside, start), optimizer_of(wide, start)
    for g in steps((12, 6), 4):
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        two.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-5)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam(order: str) -> None:
    """AdamW on one layer at a time, from scratch; what rests is not even decayed."""
    with torch.random.fork_rng():
        model = Layered()
    rule = coded(Adam())
    rules = {"matrix": rule, "other": rule, "inactive": Rest()}
    strategy = Strategy(rules=rules, source=Backprop(), schedule=Layers(3, order))
    optimizer = lowmem.LowMemOptimizer(
        list(model.named_parameters()), strategy, lr=LR, weight_decay=0.1, model=model
    )
    theirs: Any = None
    for step in range(10):
        active = (step // 3) % 3 if order == "ascending" else 2 - (step // 3) % 3
        layer = model.layers[active]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if step % 3 == 0:
            twins = [nn.Parameter(p.detach().clone()) for p in layer.parameters()]
            theirs = torch.optim.AdamW(twins, lr=LR, weight_decay=0.1)
        for i, p in enumerate(model.parameters()):
            p.grad = normal(*p.shape, seed=100 * step + i)
        for twin, p in zip(twins, layer.parameters(), strict=True):
            twin.grad = p.grad
        optimizer.step()
        theirs.step()
        for twin, p in zip(twins, layer.parameters(), strict=True):
            torch.testing.assert_close(p, twin, rtol=0, atol=1e-6)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith(f"layers.{active}."), name
        assert sum(bool(optimizer.state.get(p)) for p in model.parameters()) == 2


def test_what_does_not_fit_is_refused_when_it_is_written_down() -> None:
    with pytest.raises(UserError, match="dense basis"):
        Subspace(Elements(0.5), coded(Adam()), ScaledRest())
    with pytest.raises(UserError, match="'rotate' is not defined"):
        Subspace(DCT(Frame(2)), Muon(), on_refresh="rotate")
    with pytest.raises(UserError, match="rate must be above 0"):
        Online(Frame(2), rate=0.0)
    with pytest.raises(UserError, match="unknown order"):
        Layers(3, "sideways")
    with pytest.raises(UserError, match=r"scale must be above 0.*rotate"):
        Subspace(Gaussian(Frame(2)), coded(Adam()), on_refresh="rotate", scale=0.0)


WIDE = Frame(512)
BOUNDED = {
    "fira": Subspace(Orthonormal(WIDE), coded(Adam()), ScaledRest()),
    "apollo": Subspace(Gaussian(WIDE), coded(Adam()), ScaledGradient()),
    "online": Subspace(Online(WIDE), coded(Adam())),
    "dct": Subspace(DCT(WIDE), coded(Adam(), "int8"), on_refresh="rotate"),
    "muon": Muon.of("int8"),
    "muon inside": Subspace(Orthonormal(WIDE), Muon()),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("shape", [(2048, 5504), (5504, 2048)])
def test_a_step_takes_no_more_than_is_declared(name: str, shape: tuple[int, int]) -> None:
    """At a refresh 12 s r bytes more; what a rule declares is what the contract allows."""
    rule = BOUNDED[name]
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    basis = 12 * 512 * 2048 if isinstance(rule, Subspace) else 0
    for refresh in (False, True):
        taken = workspace_bytes(strategy, shape, torch.bfloat16, "matrix", refresh)
        assert taken <= rule.scratch(shape) + basis * refresh, f"{taken / 2**20:.0f} MiB"
