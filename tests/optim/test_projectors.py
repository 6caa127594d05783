"""What holds of every projector: an orthonormal basis, a lift that loses nothing, steps that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.contract import AnyRule, Projector
from lowmem.optim.elementwise import coded
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.projectors.bases import PROJ_TYPES, Frame
from lowmem.optim.projectors.coordinate import Columns, Elements
from lowmem.optim.projectors.dct import DCT
from lowmem.optim.projectors.dense import Find, Orthonormal, power_iteration, svd
from lowmem.optim.projectors.random import random
from lowmem.optim.residuals.rest import Drop, Stateless
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Momentum
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State, made
from lowmem.sources import Backprop

GAP = 3
FINDS: list[Find] = [power_iteration, svd, random]
SIDES = ("left", "right")
SHAPES = [(32, 8), (8, 32), (16, 16), (13, 17), (1, 9), (9, 1)]
DENSE = {
    f"{find.__name__}-{side}-{rank}": Orthonormal(Frame(rank, side), find, GAP)
    for find in FINDS
    for side in SIDES
    for rank in (3, 100)
}
COSINES = {f"dct-{side}-{rank}": DCT(Frame(rank, side), GAP) for side in SIDES for rank in (3, 100)}
EVERY: dict[str, Projector] = {
    **DENSE, **COSINES, "columns": Columns(0.3, GAP), "elements": Elements(0.3, GAP),
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refreshed(projector: Projector, shape: tuple[int, int], *grads: Tensor) -> State:
    """The basis after a refresh by each gradient in turn."""
    w = torch.zeros(shape)
    state = projector.init(w) | made(projector.constants(shape), w.device)
    for step, g in enumerate(grads):
        projector.refresh(state, Dense(g), hyper(w, step), {}, say=False)
    return state


def hyper(w: Tensor, step: int = 0) -> Hyper:
    return Hyper(step, "w", 0, 0.1, (0.9, 0.99), 1e-8, 0.0, Dense(w), Chunks().advance_)


def lift(projector: Projector, state: State, low: Tensor, like: Dense) -> Tensor:
    """The whole matrix, from pieces of three rows."""
    m, hp = like.shape[0], hyper(like.tensor)
    return torch.cat([projector.up(state, low, i, min(i + 3, m), hp) for i in range(0, m, 3)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projector", EVERY.values(), ids=EVERY)
def test_what_is_lifted_is_seen_again_and_nothing_is_counted_twice(
    projector: Projector, shape: tuple[int, int]
) -> None:
    x = Dense(normal(*shape, seed=9))
    state = refreshed(projector, shape, *(normal(*shape, seed=t) for t in range(3)))
    state = projector.opened(state, hyper(x.tensor))
    low = projector.down(state, x, hyper(x.tensor))
    assert tuple(low.shape) == projector.low_shape(shape)
    seen = lift(projector, state, low, x)
    torch.testing.assert_close(projector.down(state, Dense(seen), hyper(seen)), low, rtol=0, atol=5e-6)
    rest = (x.tensor - seen).square().sum()
    torch.testing.assert_close(low.square().sum() + rest, x.tensor.square().sum(), rtol=1e-5, atol=0)
    if projector.complete(shape):
        torch.testing.assert_close(seen, x.tensor, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projector", DENSE.values(), ids=DENSE)
def test_the_basis_is_orthonormal_and_no_wider_than_the_matrix(
    projector: Orthonormal, shape: tuple[int, int]
) -> None:
    grads = [normal(*shape, seed=t) for t in range(3)]
    for count in range(4):
        basis = refreshed(projector, shape, *grads[:count])["basis"]
        rank = basis.shape[1]
        assert rank == min(projector.frame.rank, *shape)
        rounding = max(shape) * torch.finfo(torch.float32).eps  # LAPACK's: no SVD or QR is closer
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank), rtol=0, atol=rounding)


@pytest.mark.parametrize(("projector", "count"), [(Columns(0.3), 9 * 8), (Elements(0.3), 77)], ids=str)
def test_coordinates_are_picked_once_each(projector: Projector, count: int) -> None:
    x = Dense(normal(8, 32))
    state, ones = refreshed(projector, x.shape, x.tensor), torch.ones(projector.low_shape(x.shape))
    picked = lift(projector, state, ones, x)
    assert sorted(set(picked.flatten().tolist())) == [0.0, 1.0]
    assert int(picked.sum()) == count


def captured(find: Find, side: str, g: Tensor, refreshes: int) -> Tensor:
    projector = Orthonormal(Frame(8, side), find)
    low = projector.down(refreshed(projector, tuple(g.shape), *[g] * refreshes), Dense(g), hyper(g))
    return low.square().sum() / torch.linalg.svdvals(g)[:8].square().sum()


@pytest.mark.parametrize("side", SIDES)
def test_power_iteration_sees_what_an_svd_sees(side: str) -> None:
    """Eight directions stand out of the noise; nothing that is orthonormal sees more than the SVD."""
    u, _, vt = torch.linalg.svd(normal(64, 96), full_matrices=False)
    g = (u * torch.cat([torch.linspace(10, 5, 8), torch.full((56,), 0.3)])) @ vt
    assert float(captured(svd, side, g, 1)) == pytest.approx(1.0, abs=1e-5)
    assert float(captured(power_iteration, side, g, 3)) == pytest.approx(1.0, abs=1e-5)
    assert float(captured(random, side, g, 3)) < 0.5


def follow(rule: AnyRule, shape: tuple[int, int], steps: int = 7, **hyper: Any) -> tuple[list[Tensor], State]:
    """The weights before and after each step by random gradients, normal(seed=1, 2, ...)."""
    p = nn.Parameter(normal(*shape))
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    groups = [{"params": [("w", p)], "role": "matrix"}]
    optimizer = lowmem.LowMemOptimizer(groups, strategy, **{"lr": 0.1, **hyper})
    weights = [p.detach().clone()]
    for t in range(steps):
        p.grad = normal(*shape, seed=t + 1)
        optimizer.step()
        weights.append(p.detach().clone())
    return weights, dict(optimizer.state[p])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projector", EVERY.values(), ids=EVERY)
def test_descent_in_the_subspace_and_descent_of_the_rest_are_descent(
    projector: Projector, shape: tuple[int, int]
) -> None:
    """Over three refreshes: down, up, residual and side must all fit together."""
    weights, _ = follow(Subspace(projector, coded(SGD()), Stateless(sign=False)), shape)
    expected = weights[0] - 0.1 * sum(normal(*shape, seed=t + 1) for t in range(7))
    torch.testing.assert_close(weights[-1], expected, rtol=0, atol=2e-6)


@dataclass(frozen=True)
class Average(Momentum):
    """m <- m + (1 - beta)(g - m), d = m."""

    given: ClassVar[tuple[str, ...]] = ()

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        return 1.0 - self.beta, 1.0


FIXED: dict[str, Projector] = {
    "full": Orthonormal(Frame(100)),
    "power": Orthonormal(Frame(3)),
    "columns": Columns(0.3),
    "elements": Elements(0.3),
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=str)
def test_momentum_of_what_a_fixed_subspace_sees_and_descent_of_the_rest(
    name: str, shape: tuple[int, int]
) -> None:
    """At full rank it is momentum of everything."""
    projector, average = FIXED[name], coded(Average(0.9))
    weights, state = follow(Subspace(projector, average, Stateless(sign=False)), shape)
    view = {key.removeprefix("projector."): v for key, v in state.items() if key.startswith("projector.")}
    w, m = weights[0], torch.zeros(shape)
    for t, ours in enumerate(weights[1:]):
        g = Dense(normal(*shape, seed=t + 1))
        seen = (
            g.tensor if name == "full" else lift(projector, view, projector.down(view, g, hyper(g.tensor)), g)
        )
        m = 0.9 * m + 0.1 * seen
        w = w - 0.1 * (m + g.tensor - seen)
        torch.testing.assert_close(ours, w, rtol=0, atol=2e-6)


def shuffled(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """The SVD's basis, in another order and with other signs after the first time."""
    new, ok = svd(frame, torch.zeros_like(basis), g, hp)
    return (new if hp.first else new[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0])), ok


def in_order(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    return svd(frame, torch.zeros_like(basis), g, hp)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_order_and_signs_of_a_basis_do_not_matter_to_moments_that_rotate(shape: tuple[int, int]) -> None:
    def apart(on_refresh: str) -> float:
        ends = [
            follow(
                Subspace(Orthonormal(Frame(3), find, GAP), coded(Adam()), Drop(), on_refresh), shape, lr=0.01
            )[0]
            for find in (in_order, shuffled)
        ]
        return float((ends[0][-1] - ends[1][-1]).abs().max())

    assert apart("rotate") < 1e-6
    assert apart("keep") > 1e-3


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_frugal_without_a_rest_is_galore(shape: tuple[int, int]) -> None:
    """GaLore's scale is a factor of the learning rate."""

    def run(name: str, lr: float, **options: Any) -> Tensor:
        p = nn.Parameter(normal(*shape))
        strategy = lowmem.create(name, update_proj_gap=GAP, on_refresh="keep", **options)
        groups = [{"params": [("w", p)], "role": "matrix"}]
        optimizer = lowmem.LowMemOptimizer(groups, strategy, lr=lr)
        for t in range(3 * GAP):
            p.grad = normal(*shape, seed=t + 1)
            optimizer.step()
        return p.detach()

    galore = run("galore", 0.04, scale=0.25, rank=4, projector="svd")
    frugal = run("frugal", 0.01, projector="svd", rank=0.5, residual="sgd", residual_scale=0.0)
    torch.testing.assert_close(frugal, galore, rtol=0, atol=1e-6)


@pytest.mark.parametrize("projector", ["svd", "power"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_rank_above_the_short_side_trains_whichever_side_is_spanned(projector: str, proj_type: str) -> None:
    model = nn.Linear(64, 512)
    before = model.weight.detach().clone()
    optimizer = lowmem.optimizer(model, "galore", rank=128, proj_type=proj_type, projector=projector)
    model(normal(4, 64)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_a_side_that_was_chosen_is_stored_and_kept() -> None:
    """Where rows lie on ranks auto is right, here it is std; a checkpoint goes on with what it was."""

    def stepped(proj_type: str, saved: dict[str, Any] | None = None) -> lowmem.LowMemOptimizer:
        weight = nn.Parameter(normal(8, 24))
        optimizer = lowmem.optimizer([weight], "galore", rank=4, proj_type=proj_type)
        if saved is not None:
            optimizer.load_state_dict(saved)
        weight.grad = normal(8, 24, seed=1)
        optimizer.step()
        return optimizer

    for side in ("std", "right"):
        given = stepped(side)
        saved = given.state_dict()
        one, auto = (stepped(proj_type, saved) for proj_type in (side, "auto"))
        held, other = (next(iter(optimizer.state.values())) for optimizer in (one, auto))
        assert auto.strategy == given.strategy
        assert torch.equal(*(optimizer.param_groups[0]["params"][0] for optimizer in (one, auto)))
        assert all(torch.equal(held[key], other[key]) for key in held)
    assert stepped("auto").strategy == stepped("std").strategy
