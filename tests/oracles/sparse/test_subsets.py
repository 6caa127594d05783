"""AdamSN and AdamSNSM against a transcription of their paper, and what must be true of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.coordinate import Columns
from lowmem.optim.projectors.dense import Orthonormal, svd
from lowmem.optim.projectors.random import Gaussian
from lowmem.optim.residuals.rest import Stateless, SubsetNormed
from lowmem.optim.rules.compact.subsets import SubsetNorm, Subsets
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import AverageGradient
from lowmem.optim.subspace import Subspace
from tests.oracles.low_rank.test_subspaces import BETAS, EPS, LR, near, normal, optimizer_of, steps
from tests.oracles.sparse.reference_subsets import AdamSN, AdamSNSM

AVERAGE = coded(AverageGradient(bias_correction=False))
RANK, GAP = 3, 3


def run(rule: object, start: Tensor, gradients: list[Tensor]) -> Tensor:
    optimizer, p = optimizer_of(rule, start)  # type: ignore[arg-type]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (5, 5)])
@pytest.mark.parametrize("size", [0, 7])
def test_subset_norm_is_the_papers(shape: tuple[int, int], size: int) -> None:
    """Rows, columns, or seven elements at a time, of which the last has what is left."""
    start = normal(*shape)
    optimizer, p = optimizer_of(SubsetNorm.of("fp32", size=size), start, weight_decay=0.1)
    truth = AdamSN(start.double(), size, LR, BETAS, EPS, 0.1)
    for g in steps(shape, 6):
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), truth.step(g.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("states", "close"), [("bf16", 0.01), ("int8", 0.03)])
def test_a_compressed_momentum_stays_near_it(states: str, close: float) -> None:
    start, truth = normal(24, 40), AdamSN(normal(24, 40).double(), 0, LR, BETAS, EPS)
    gradients = steps((24, 40), 6)
    expected = [truth.step(g.double()) for g in gradients][-1]
    near(run(SubsetNorm.of(states), start, gradients), expected, start, close)


def test_subsets_of_one_element_are_adam() -> None:
    """Whatever the shape."""
    start, gradients = normal(6, 12), steps((6, 12), 6)
    ours, adam = (run(rule, start, gradients) for rule in (SubsetNorm.of("fp32", size=1), coded(Adam())))
    torch.testing.assert_close(ours, adam, rtol=0, atol=1e-7)


def test_norms_are_sums() -> None:
    """Twice as many equal coordinates make a step shorter by the root of two."""
    start, gradients = torch.zeros(6, 4), [g[:, :4] for g in steps((6, 12), 4)]
    once = run(SubsetNorm.of("fp32"), start, gradients)
    twice = run(SubsetNorm.of("fp32", size=8), torch.zeros(6, 8), [torch.cat([g, g], 1) for g in gradients])
    torch.testing.assert_close(twice[:, :4] * 2**0.5, once, rtol=1e-5, atol=0)


def test_one_subset_is_the_normalised_gradient() -> None:
    """The first step is lr G / |G|."""
    g = normal(6, 12, seed=1)
    moved = run(SubsetNorm.of("fp32", size=72), torch.zeros(6, 12), [g])
    torch.testing.assert_close(moved, -LR * g / g.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_subspace_momentum_is_the_papers_and_not_what_was_released(side: str) -> None:
    rule = Subspace(Orthonormal(Frame(RANK), svd, GAP), AVERAGE, SubsetNormed(), on_refresh="reset")
    turned = (lambda x: x) if side == "left" else (lambda x: x.mT.contiguous())
    start = normal(6, 12)
    optimizer, p = optimizer_of(rule, turned(start))
    truth, released = (AdamSNSM(start.double(), LR, BETAS, EPS, released=r) for r in (False, True))
    refreshes, apart = 0, 0.0
    for t, g in enumerate(steps((6, 12), 8)):
        fresh = t > 0 and optimizer.hyper(p, first=False).due(GAP)
        p.grad = turned(g)
        optimizer.step()
        state = optimizer.state[p]
        basis = state["projector.basis"].double()
        expected = truth.step(g.double(), basis, fresh)
        torch.testing.assert_close(turned(p.detach()).double(), expected, rtol=0, atol=1e-6)
        apart = max(apart, float((released.step(g.double(), basis, fresh) - expected).abs().max()))
        if fresh:  # neither zero nor stale
            low = (1 - BETAS[0]) * basis.mT @ g.double()
            torch.testing.assert_close(turned(state["inner.exp_avg"]).double(), low, rtol=0, atol=1e-6)
            refreshes += 1
    assert refreshes >= 2
    assert apart > 1e-4


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (5, 5)])
@pytest.mark.parametrize("spike", [1e4, 1e20])
def test_a_step_is_divided_by_all_that_its_momentum_has_seen(
    spike: float, shape: tuple[int, int], proj_type: str
) -> None:
    """Whatever side the basis spans: it spreads an element over a channel, and no subset has part of one."""
    strategy = lowmem.create("subspace_momentum", rank=RANK, update_proj_gap=100, proj_type=proj_type)
    optimizer, p = optimizer_of(strategy.rules["matrix"], torch.zeros(shape))
    gradients = [normal(*shape, seed=t) for t in range(5)]
    gradients[1][1, 3] = spike
    for g in gradients:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        assert (p.detach() - before).abs().max() <= 20.0 * LR
    left = proj_type == "left" or (proj_type != "right" and (shape[0] < shape[1]) == (proj_type == "std"))
    assert optimizer.state[p]["residual.exp_avg_sq"].shape == (shape[1 if left else 0],)


def test_subsets_of_other_sizes_beside_a_basis_are_refused() -> None:
    """They cut through the channels that it spreads an element over."""
    with pytest.raises(UserError, match=r"subset_size.*rule=subset_norm"):
        lowmem.create("subspace_momentum", subset_size=5)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_full_rank_without_refresh_is_momentum(shape: tuple[int, int]) -> None:
    """Where nothing is divided by norms."""
    whole = Subspace(Orthonormal(Frame(6), update_proj_gap=1000), AVERAGE, Stateless(sign=False))
    start, gradients = normal(*shape), steps(shape, 5)
    torch.testing.assert_close(
        run(whole, start, gradients), run(AVERAGE, start, gradients), rtol=0, atol=3e-6
    )


def test_momentum_in_a_fixed_basis_and_descent_beside_it() -> None:
    """Both parts, step by step."""
    rule = Subspace(Orthonormal(Frame(RANK), update_proj_gap=1000), AVERAGE, Stateless(sign=False))
    start = normal(6, 12)
    optimizer, p = optimizer_of(rule, start)
    w, m = start.double(), torch.zeros(RANK, 12, dtype=torch.float64)
    for g in steps((6, 12), 6):
        p.grad = g
        optimizer.step()
        basis = optimizer.state[p]["projector.basis"].double()
        low = basis.mT @ g.double()
        m = BETAS[0] * m + (1 - BETAS[0]) * low
        w = w - LR * (basis @ m + g.double() - basis @ low)
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=2e-6)


def test_an_average_without_bias_begins_with_the_gradient() -> None:
    """And is torch's momentum with dampening, over 1 - beta1^t."""
    start, gradients = normal(6, 12), steps((6, 12), 5)
    w, m = start.double(), torch.zeros(6, 12, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g.double()
        w = w - LR * m / (1 - BETAS[0] ** t)
    ours = run(coded(AverageGradient()), start, gradients)
    torch.testing.assert_close(ours.double(), w, rtol=0, atol=1e-6)


def test_a_bad_element_leaves_the_norms_of_other_subsets_finite() -> None:
    """Where a projection does not see it, its own subset keeps its moment and the others go on."""
    rule = Subspace(Columns(2, 1000), AVERAGE, SubsetNormed())
    optimizer, p = optimizer_of(rule, normal(12, 6))
    p.grad = normal(12, 6, seed=1)
    optimizer.step()
    seen = optimizer.state[p]["projector.index"].tolist()
    unseen = next(j for j in range(6) if j not in seen)
    before, norms = p.detach().clone(), optimizer.state[p]["residual.exp_avg_sq"].clone()
    p.grad = normal(12, 6, seed=2)
    p.grad[4, unseen] = torch.nan
    optimizer.step()
    after = optimizer.state[p]["residual.exp_avg_sq"]
    assert p.isfinite().all()
    assert torch.equal(p.detach()[4, unseen], before[4, unseen])
    assert torch.equal(after[4], norms[4])
    assert (after != norms).sum() == 11


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (9, 7)])
def test_bytes_are_those_of_the_closed_form(shape: tuple[int, int]) -> None:
    long, short = max(shape), min(shape)
    count = shape[0] * shape[1]
    named = {
        lowmem.create("subset_norm"): 4 * count + 4 * long + 4,
        lowmem.create("subset_norm", subset_size=5): 4 * count + 4 * -(-count // 5) + 4,
        lowmem.create("subspace_momentum", rank=3): 4 * (short * 3 + 3 * long + long) + 8,
    }
    for strategy, expected in named.items():
        assert lowmem.state_bytes(strategy, shape) == expected


def test_what_is_not_defined_is_refused() -> None:
    with pytest.raises(UserError, match="orthonormal basis"):
        Subspace(Gaussian(Frame(2)), AVERAGE, SubsetNormed())
    with pytest.raises(UserError, match="take rule=average"):
        Subspace(Orthonormal(Frame(2)), coded(Adam()), SubsetNormed())
    with pytest.raises(UserError, match="subset_size"):
        Subsets(-1)
