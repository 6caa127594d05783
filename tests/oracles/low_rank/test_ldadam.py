"""LDAdam and Lotus against transcriptions of their papers; and error feedback on its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.memory.count import workspace_bytes
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.blend import Blend
from lowmem.optim.projectors.coordinate import Columns
from lowmem.optim.projectors.dct import DCT
from lowmem.optim.projectors.dense import Orthonormal
from lowmem.optim.projectors.drift import Drift
from lowmem.optim.projectors.lazy import Lazy
from lowmem.optim.residuals.feedback import Feedback
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from tests.oracles.low_rank.reference_ldadam import LDAdam, efficiency
from tests.oracles.low_rank.test_mlorc import waves
from tests.oracles.low_rank.test_subspaces import (
    BETAS,
    EPS,
    LR,
    near,
    normal,
    optimizer_of,
    steps,
    through_a_checkpoint,
)

ADAM, RANK, GAP = coded(Adam()), 3, 4
OWED = Feedback(momentum=True)
Turn = Callable[[Tensor], Tensor]


def turned(side: str) -> Turn:
    return (lambda x: x) if side == "left" else (lambda x: x.mT.contiguous())


def ldadam(states: str = "fp32", rank: int = RANK, gap: int = 1) -> Subspace:
    owed = Feedback.of(states, momentum=True)
    return Subspace(Blend(Frame(rank), update_proj_gap=gap), ADAM, owed, on_refresh="rotate")


@pytest.mark.parametrize("side", ["left", "right"])
def test_ldadam_is_the_papers(side: str) -> None:
    """Basis, error and weight, over steps whose basis moves every time."""
    of, start = turned(side), normal(6, 12)
    optimizer, p = optimizer_of(ldadam(), of(start), weight_decay=0.1)
    truth, first = LDAdam(start.double(), LR, BETAS, EPS, 0.908, 0.1), torch.zeros(())
    for t, g in enumerate(steps((6, 12), 8)):
        p.grad = of(g)
        optimizer.step()
        state = optimizer.state[p]
        first = first if t else state["projector.basis"].double()
        torch.testing.assert_close(of(p.detach()).double(), truth.step(g.double(), first), rtol=0, atol=2e-5)
        torch.testing.assert_close(state["projector.basis"].double(), truth.p, rtol=0, atol=2e-4)
        torch.testing.assert_close(of(state["residual.error"]).double(), truth.e, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("states", "close"), [("bf16", 0.03), ("int8", 0.1)])
def test_an_error_in_fewer_bits_stays_near_it(states: str, close: float) -> None:
    start = normal(24, 40)
    (exact, p), (ours, q) = (optimizer_of(ldadam(one), start) for one in ("fp32", states))
    signal = normal(24, 3, seed=1) @ normal(3, 40, seed=2)
    for t in range(6):
        p.grad = signal + 0.3 * normal(24, 40, seed=10 + t)
        q.grad = p.grad.clone()
        exact.step()
        ours.step()
    near(q.detach(), p.detach().double(), start, close)


def test_full_rank_owes_nothing_and_is_adam_in_the_basis() -> None:
    """There is no rest, and none is held."""
    start = normal(6, 12)
    optimizer, p = optimizer_of(ldadam(rank=6, gap=1000), start)
    plain, q = optimizer_of(ADAM, torch.zeros(6, 12))
    for g in steps((6, 12), 5):
        p.grad = g
        optimizer.step()
        basis = optimizer.state[p]["projector.basis"]
        q.grad = basis.mT @ g
        plain.step()
    torch.testing.assert_close(p.detach(), start + basis @ q.detach(), rtol=0, atol=2e-6)
    assert not any(key.startswith("residual") for key in optimizer.state[p])


def test_the_first_step_of_a_new_direction_is_no_longer_than_lr() -> None:
    """Without the transport of the second moment it would be 3.16 lr."""
    rule = Subspace(Blend(Frame(1), update_proj_gap=1, rho=0.0), ADAM, on_refresh="rotate")
    optimizer, p = optimizer_of(rule, torch.zeros(6, 12))
    one, other = torch.zeros(6, 12), torch.zeros(6, 12)
    one[0], other[1] = 1.0, 1.0
    other[0] = 1e-3  # an iteration cannot turn to what the basis does not see at all
    for g in [one] * 30 + [other]:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    assert float((p.detach() - before)[1].abs().max()) <= 1.01 * LR


@pytest.mark.parametrize(
    "projector", [DCT(Frame(RANK), 2), Columns(4, 2), Orthonormal(Frame(RANK), update_proj_gap=2)]
)
@pytest.mark.parametrize("states", ["fp32", "int8", "int4"])
def test_what_was_stepped_and_what_is_owed_are_all_gradients(projector: object, states: str) -> None:
    """Exactly; in fewer bits up to the rounding of what is owed, once for each step."""
    optimizer, p = optimizer_of(
        Subspace(projector, coded(SGD()), Feedback.of(states)),
        torch.zeros(6, 12),  # type: ignore[arg-type]
    )
    total, rounding, owed = torch.zeros(6, 12), 1e-4, torch.zeros(6, 12)
    for g in steps((6, 12), 9):
        p.grad = g
        optimizer.step()
        total += g
        held = {key.removeprefix("residual."): x for key, x in optimizer.state[p].items()}
        tables = tables_of(states)
        owed = Feedback.of(states)._owed(held | tables, (6, 12), optimizer.hyper(p)).rows(0, 6)
        if states != "fp32":  # half the widest gap of the map, in units of the largest element
            widest = next(table for key, table in tables.items() if key.endswith("map")).diff().max()
            rounding += 0.5 * float(widest * held["error.scale"].max()) * 1.001
        assert float((total + p.detach() / LR - owed).abs().max()) <= rounding
    assert float(owed.abs().max()) > 1.0


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_a_bad_element_that_is_not_seen_is_counted_and_not_owed(states: str) -> None:
    optimizer, p = optimizer_of(Subspace(Columns(2, 1000), ADAM, Feedback.of(states)), normal(6, 12))
    p.grad = normal(6, 12, seed=1)
    optimizer.step()
    seen, before = optimizer.state[p]["projector.index"].tolist(), p.detach().clone()
    unseen = next(j for j in range(12) if j not in seen)
    p.grad = normal(6, 12, seed=2)
    p.grad[3, unseen] = torch.inf
    optimizer.step()
    assert optimizer.nonfinite() == 1
    assert all(x.isfinite().all() for x in (*optimizer.state[p].values(), p.detach()))
    assert (p.detach() != before).sum() == 12


def tables_of(states: str) -> dict[str, Tensor]:
    made = Feedback.of(states).constants((6, 12))
    return {key: one.make(torch.device("cpu")) for key, one in made.items()}


@pytest.mark.parametrize("bad", [0.0, math.nan])
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_what_a_gradient_without_use_leaves(bad: float, states: str) -> None:
    """NaN: nothing moves. Zero: what is owed is stepped by."""
    optimizer, p = optimizer_of(ldadam(states), normal(6, 12))
    for g in steps((6, 12), 3):
        p.grad = g
        optimizer.step()
    before, held = p.detach().clone(), {key: x.clone() for key, x in optimizer.state[p].items()}
    p.grad = torch.full((6, 12), bad)
    optimizer.step()
    assert torch.equal(p.detach(), before) == math.isnan(bad)
    assert all(x.isfinite().all() for x in optimizer.state[p].values())
    if math.isnan(bad):
        owed = [key for key in held if key.startswith(("residual", "projector"))]
        assert all(torch.equal(optimizer.state[p][key], held[key]) for key in owed)


def test_the_efficiency_is_the_papers() -> None:
    """Known numbers: the leading two directions of the first of three gradients."""
    gradients = [g.double() for g in waves((3, 4))[1]]
    p = torch.linalg.svd(gradients[0])[0][:, :2]
    found = [efficiency(p, gradients[:t]) for t in (1, 2, 3)]
    assert found == pytest.approx([0.909887, 0.795672, 0.700956], abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lotus_replaces_its_basis_once_the_way_leaves_it(side: str) -> None:
    """With as many probes as columns the efficiency is the paper's; one subspace, then another."""
    of = turned(side)
    rule = Subspace(Drift(Frame(2), update_proj_gap=GAP, threshold=0.6, probes=12), ADAM)
    optimizer, p = optimizer_of(rule, of(normal(6, 12)))
    one, other = (torch.linalg.qr(normal(6, 6, seed=9))[0][:, a : a + 2] for a in (0, 2))
    since: list[Tensor] = []
    basis, kept, replaced = torch.zeros(()), 0, 0
    for t in range(24):
        g = (one if t < 12 else other) @ normal(2, 12, seed=t + 1).abs() + 0.2 * normal(6, 12, seed=50 + t)
        looks = t > 0 and optimizer.hyper(p, first=False).due(GAP)
        p.grad = of(g)
        optimizer.step()
        new = optimizer.state[p]["projector.basis"].double()
        if looks:
            leaves = efficiency(basis, since) < 0.6
            assert torch.equal(new, basis) != leaves
            kept, replaced, since = kept + (not leaves), replaced + leaves, []
        elif t:
            assert torch.equal(new, basis)
        basis, since = new, [*since, g.double()]
        gone = sum(x / x.norm() for x in since)
        path = optimizer.state[p]["projector.path"].double()
        torch.testing.assert_close(path, gone, rtol=0, atol=1e-5)
    assert kept >= 2
    assert replaced >= 1


def test_a_few_probes_measure_the_way() -> None:
    """16 random combinations of 300 columns: within a few percent of the efficiency itself."""
    rule = Subspace(Drift(Frame(8), update_proj_gap=1000), ADAM)
    optimizer, p = optimizer_of(rule, torch.zeros(40, 300))
    gradients = [
        normal(40, 8, seed=1) @ normal(8, 300, seed=2) + normal(40, 300, seed=t) for t in range(3, 9)
    ]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    basis, path = (optimizer.state[p][f"projector.{key}"].double() for key in ("basis", "path"))
    assert path.shape == (40, 16)
    measured = float((basis.mT @ path).norm() / path.norm())
    assert measured == pytest.approx(efficiency(basis, [g.double() for g in gradients]), abs=0.05)


def test_a_basis_of_which_gradients_have_nothing_is_replaced() -> None:
    """R is zero to the last bit: what tells is the gradient."""
    rule = Subspace(Drift(Frame(1), update_proj_gap=1), ADAM)
    optimizer, p = optimizer_of(rule, torch.zeros(6, 12))
    for row in (0, 3, 3):
        p.grad = torch.zeros(6, 12)
        p.grad[row] = 1.0
        optimizer.step()
    assert float(optimizer.state[p]["projector.basis"][3].abs()) > 0.99


@pytest.mark.parametrize("name", ["ldadam", "lotus"])
@pytest.mark.parametrize("stop", [4, 5])
def test_what_resumes_ends_where_it_would_have(name: str, stop: int) -> None:
    """Bit for bit; and bytes are those of the closed form."""
    strategy = lowmem.create(name, rank=3)
    rule = strategy.rules["matrix"]
    through_a_checkpoint(rule, (9, 24), 8, stop)
    more = 4 * 9 * 24 if name == "ldadam" else 4 * 9 * 16
    assert lowmem.state_bytes(strategy, (9, 24)) == 4 * 9 * 3 + 8 * 3 * 24 + more + 4


@pytest.mark.parametrize("shape", [(2048, 5504), (5504, 2048)])
@pytest.mark.parametrize("name", ["ldadam", "lotus"])
def test_a_step_takes_no_more_than_is_declared(name: str, shape: tuple[int, int]) -> None:
    rule = lowmem.create(name, rank=512).rules["matrix"]
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    for refresh in (False, True):
        taken = workspace_bytes(strategy, shape, torch.bfloat16, "matrix", refresh=refresh)
        assert taken <= rule.scratch(shape) + 12 * 512 * 2048, f"{taken / 2**20:.0f} MiB"


def test_what_is_not_defined_is_refused() -> None:
    """A momentum that cannot be read, a basis that is not orthonormal, numbers out of range."""
    blend = Blend(Frame(2))
    with pytest.raises(UserError, match=r"take rule=adam with states=fp32"):
        Subspace(blend, coded(SGD()))
    with pytest.raises(UserError, match=r"take rule=adam with states=fp32"):
        Subspace(blend, coded(Adam(), "int8"))
    with pytest.raises(UserError, match=r"take on_refresh=rotate"):
        Subspace(blend, ADAM, OWED)
    with pytest.raises(UserError, match=r"orthonormal basis"):
        Subspace(Lazy(Frame(2)), ADAM, Feedback())
    for make in (lambda: Blend(Frame(2), rho=1.0), lambda: Drift(Frame(2), threshold=0.0)):
        with pytest.raises(UserError):
            make()
    Subspace(Blend(Frame(2), rho=0.0), coded(Adam(), "int8"))
