"""A first gradient that tells no basis: it is found by one that does, and nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.memory.count import state_bytes
from lowmem.optim.blocks import Dense, Projected
from lowmem.optim.engine.cutting import policy
from lowmem.optim.projectors.dense import found
from lowmem.optim.release import release
from tests.oracles.drive import on_weights, step

GAP, RANK, SHAPE = 1000, 4, (24, 40)
NAMES = {
    "fira": {"update_proj_gap": GAP},
    "galore": {"update_proj_gap": GAP},
    "golore": {"update_proj_gap": GAP},
    "grass_walk": {"update_proj_gap": GAP},
    "ldadam": {"update_proj_gap": GAP},
    "lotus": {"update_proj_gap": GAP},
    "online_subspace": {},
    "q_galore": {"update_proj_gap": GAP},
    "subspace_momentum": {"update_proj_gap": GAP},
    "subtrack": {"update_proj_gap": GAP},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signal(steps: int, first: float | None = 0.0) -> tuple[Tensor, list[Tensor]]:
    """A subspace, and gradients of it with a little noise; the first is of one number, or like the others."""
    span = torch.linalg.qr(normal(SHAPE[0], RANK, seed=0))[0]
    grads = [
        span @ normal(RANK, SHAPE[1], seed=t + 1) + 0.01 * normal(*SHAPE, seed=-t - 1) for t in range(steps)
    ]
    return span, grads if first is None else [torch.full(SHAPE, first), *grads[1:]]


def made(name: str, **options: Any) -> tuple[lowmem.LowMemOptimizer, dict[str, Any]]:
    start = {"w": normal(*SHAPE, seed=77)}
    return on_weights(name, start, hyper={"lr": 1e-3}, rank=RANK, **NAMES[name] | options)


def basis_of(optimizer: lowmem.LowMemOptimizer, p: Any) -> Tensor:
    projector: Any = optimizer.strategy.rules["matrix"]
    held = {k.removeprefix("projector."): x for k, x in optimizer.state[p].items() if "projector." in k}
    basis: Tensor = projector.projector.opened(held, optimizer.hyper(p))["basis"]
    return basis


def seen(span: Tensor, basis: Tensor) -> float:
    """The share of the subspace that a basis sees."""
    return float((torch.linalg.qr(basis)[0].t() @ span).square().sum()) / RANK


@pytest.mark.parametrize("first", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_basis_is_found_by_the_first_gradient_that_tells_one(name: str, first: float) -> None:
    span, grads = signal(3, first)
    optimizer, params = made(name)
    step(optimizer, params, {"w": grads[0]})
    assert not found(basis_of(optimizer, params["w"]))
    step(optimizer, params, {"w": grads[1]})
    assert seen(span, basis_of(optimizer, params["w"])) > 0.9


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"ldadam", "golore"}))
def test_a_gradient_between_two_looks_leaves_the_axes_to_be_found(name: str) -> None:
    """At step 3, where nobody looks; step 4 does."""
    span, grads = signal(5)
    optimizer, params = made(name)
    for t, g in enumerate(grads):
        step(optimizer, params, {"w": torch.zeros(SHAPE) if t < 3 else g})
    assert seen(span, basis_of(optimizer, params["w"])) > 0.9


@pytest.mark.parametrize("name", ["galore", "subtrack"])
def test_moments_that_follow_a_basis_stay_where_it_is_not_looked_for_again(name: str) -> None:
    """To the bit: at the steps between, the projector says that nothing turned."""
    _, grads = signal(6, None)
    optimizer, params = made(name, on_refresh="rotate")
    projector: Any = optimizer.strategy.rules["matrix"]
    for g in grads:
        step(optimizer, params, {"w": g})
    held = dict(optimizer.state[params["w"]])
    before = {k: x.clone() for k, x in held.items()}
    projector.prepare(Dense(grads[0]), held, replace(optimizer.hyper(params["w"]), step=8))
    assert all(torch.equal(before[k], x) for k, x in held.items())


@pytest.mark.parametrize("gap", [3, GAP])
@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"online_subspace", "ldadam", "lotus", "q_galore"}))
def test_a_basis_that_was_found_is_not_looked_for_again(name: str, gap: int) -> None:
    """On a device nobody knows that it was: what is found there is dropped, and the bits are the same."""
    _, grads = signal(9, None)
    both = []
    for where in ("cpu", "cuda"):
        with policy(where):
            optimizer, params = made(name, update_proj_gap=gap)
            bases = []
            for g in grads:
                step(optimizer, params, {"w": g})
                bases.append(basis_of(optimizer, params["w"]).clone())
            both.append((bases, params["w"].detach().clone()))
    (one, w), (other, v) = both
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(w, v)
    moved = [t for t in range(1, 9) if not torch.equal(one[t], one[t - 1])]
    hp = optimizer.hyper(params["w"])
    assert moved == [t for t in range(1, 9) if replace(hp, step=t).due(gap)]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_what_resumes_before_a_basis_is_found_ends_where_it_would_have(name: str, where: str) -> None:
    """Nothing more is held to know of it: what is planned is what is there."""
    _, grads = signal(5)
    with policy(where):
        whole, params = made(name)
        for g in grads:
            step(whole, params, {"w": g})
        first, begun = made(name)
        step(first, begun, {"w": grads[0]})
        again, onward = made(name)
        onward["w"].data.copy_(begun["w"])
        again.load_state_dict(first.state_dict())
        for g in grads[1:]:
            step(again, onward, {"w": g})
    assert torch.equal(params["w"], onward["w"])
    held = sum(x.nbytes for x in whole.state[params["w"]].values())
    assert state_bytes(whole.strategy, SHAPE) == held


def test_a_basis_of_all_directions_lacks_none() -> None:
    assert found(torch.eye(3))
    assert not found(torch.eye(4)[:, :3])
    assert found(torch.linalg.qr(normal(4, 3, seed=1))[0])


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_projection_alone_finds_no_basis(where: str) -> None:
    """Gradients that accumulate into their projection are found a basis for at a refresh by the period."""
    optimizer, params = made("galore")
    step(optimizer, params, {"w": torch.zeros(SHAPE)})
    low = torch.zeros(RANK, SHAPE[1])
    with policy(where):
        optimizer.step_param(params["w"], Projected(SHAPE, low, torch.float32))
    assert not found(basis_of(optimizer, params["w"]))


def chosen(optimizer: lowmem.LowMemOptimizer, p: Any) -> list[int]:
    index: list[int] = optimizer.state[p]["projector.index"].tolist()
    return index


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize(("first", "zeros", "when"), [(0.0, 1, 1), (math.nan, 1, 1), (0.0, 3, 4)])
def test_cosines_are_chosen_by_the_first_gradient_that_has_some(
    first: float, zeros: int, when: int, where: str
) -> None:
    """At a step at which one looks, and 3 is none; later ones choose nothing."""
    grads = [torch.full(SHAPE, first) if t < zeros else normal(*SHAPE, seed=t) for t in range(9)]
    again, fresh = made("galore", projector="dct")
    step(again, fresh, {"w": grads[when]})
    with policy(where):
        optimizer, params = made("galore", projector="dct", on_refresh="rotate")
        for t, g in enumerate(grads):
            step(optimizer, params, {"w": g})
            index = chosen(optimizer, params["w"])
            assert index == chosen(again, fresh["w"]) if t >= when else max(index) < 0


def test_the_slowest_cosines_are_a_choice_like_any_other() -> None:
    """Nothing is looked for again where the first gradient has chosen what is there to begin with."""
    with policy("cuda"):
        optimizer, params = made("galore", projector="dct")
        step(optimizer, params, {"w": normal(*SHAPE, seed=1)})
        basis = optimizer.constants(params["w"])["projector.cosines"]
        again, other = made("galore", projector="dct")
        step(again, other, {"w": basis[:RANK].t() @ normal(RANK, SHAPE[1], seed=2)})
        for t in range(1, 5):
            step(again, other, {"w": normal(*SHAPE, seed=t)})
    assert chosen(again, other["w"]) == list(range(RANK))


@pytest.mark.parametrize("options", [{}, {"projector": "dct"}, {"projector": "lazy"}])
def test_gradients_that_accumulate_under_release_find_a_first_basis(options: dict[str, Any]) -> None:
    """A window of zeros, then one that tells a basis: the whole gradient is kept for it, and only for it."""
    ends, kept = [], []
    for released in (False, True):
        model = nn.Linear(40, 24, bias=False)
        model.weight.data.copy_(normal(24, 40, seed=7))
        optimizer = lowmem.optimizer(model, "galore", lr=1e-2, rank=RANK, update_proj_gap=GAP, **options)
        handle = release(optimizer, accumulation_steps=2) if released else None
        for t in range(4):
            for micro in range(2):
                if handle:
                    handle.sync = micro == 1
                x = normal(8, 40, seed=2 * t + micro) * float(t > 0)
                model(x).square().sum().backward()
                kept.append(model.weight.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.weight.detach().clone())
    assert kept[8:] == [True, False, True, False, False, False, False, False]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
