"""MLorc against a transcription with exact decompositions, Adam, and published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.rules.compact.mlorc import MLorc
from lowmem.optim.rules.elementwise.adam import Adam
from tests.oracles.low_rank import reference_mlorc as reference
from tests.oracles.low_rank.test_subspaces import BETAS, EPS, LR, near, normal, optimizer_of, steps

KNOWN = {
    (3, 4): [0.250663, -0.298029, 0.371862, -0.438888, -0.490848, 0.447655, -0.433731, 0.413785, 0.165442,
             -0.048854, 0.025064, 0.094943],
    (4, 3): [0.251590, -0.295001, 0.374599, -0.488043, 0.448686, -0.433627, 0.163090, -0.049192, 0.027047,
             0.393969, -0.446418, 0.440397],
}  # fmt: skip


def waves(shape: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    m, n = shape
    w = torch.tensor([[0.5 * math.cos(1 + 2 * i + 3 * j) for j in range(n)] for i in range(m)])
    gradients = [
        torch.tensor([[math.sin((i + 1) * (2 * j + 1) + t) for j in range(n)] for i in range(m)])
        for t in (1, 2, 3)
    ]
    return w, gradients


def run(rule: object, start: Tensor, gradients: list[Tensor], **hyper: float) -> Tensor:
    optimizer, p = optimizer_of(rule, start, **hyper)  # type: ignore[arg-type]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", KNOWN)
def test_the_transcription_is_the_released_code(shape: tuple[int, int]) -> None:
    start, gradients = waves(shape)
    truth = reference.MLorc(start.double(), 2, 0.01, (0.9, 0.999), 1e-8, 0.1, released=True)
    got = [truth.step(g.double()) for g in gradients][-1]
    known = torch.tensor(KNOWN[shape], dtype=torch.float64).view(shape)
    torch.testing.assert_close(got, known, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (6, 12)])
def test_mlorc_is_the_papers(shape: tuple[int, int]) -> None:
    """Iterated until it is exact; the fourth step's moments come from those that were cut three times."""
    start, gradients = waves(shape) if shape != (6, 12) else (normal(6, 12), steps((6, 12), 4))
    truth = reference.MLorc(start.double(), 2, LR, BETAS, EPS, 0.1)
    expected = [truth.step(g.double()) for g in gradients][-1]
    got = run(MLorc(Frame(2), 200), start, gradients, weight_decay=0.1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_full_rank_is_adam(shape: tuple[int, int]) -> None:
    start, gradients = normal(*shape), steps(shape, 6)
    near(run(MLorc(Frame(6)), start, gradients), run(coded(Adam()), start, gradients).double(), start, 1e-3)


def test_what_has_low_rank_is_adam_at_that_rank() -> None:
    """Multiples of one outer product, and their squares: nothing is cut off."""
    start, outer = normal(8, 10), normal(8, 1, seed=1) @ normal(1, 10, seed=2)
    gradients = [outer * (-1) ** t * (1 + t) for t in range(6)]
    near(run(MLorc(Frame(1)), start, gradients), run(coded(Adam()), start, gradients).double(), start, 1e-3)


def test_one_iteration_a_step_is_near_the_best_of_its_rank() -> None:
    """Gradients of one subspace with noise: what is held misses a tenth more than it must."""
    signal = normal(24, 3, seed=1) @ normal(3, 40, seed=2)
    optimizer, p = optimizer_of(MLorc(Frame(3)), normal(24, 40))
    held = {name: torch.zeros(24, 40, dtype=torch.float64) for name in ("exp_avg", "exp_avg_sq")}
    for t in range(8):
        g = signal + 0.3 * normal(24, 40, seed=10 + t)
        p.grad = g.clone()
        optimizer.step()
        for name, power, beta in (("exp_avg", 1, BETAS[0]), ("exp_avg_sq", 2, BETAS[1])):
            old = held[name] if power == 1 else reference.repaired(held[name])
            full = beta * old + (1 - beta) * g.double() ** power
            basis, low = (optimizer.state[p][f"{name}.{key}"].double() for key in ("basis", "low"))
            held[name] = basis @ low
            best = (full - reference.truncated(full, 3)).norm()
            assert best > 0
            assert (full - held[name]).norm() <= 1.1 * best


def test_vectors_take_adam() -> None:
    start, gradients = normal(1, 9)[0], [normal(1, 9, seed=t)[0] for t in range(5)]
    ours, adam = (run(rule, start, gradients) for rule in (MLorc(Frame(4)), coded(Adam())))
    torch.testing.assert_close(ours, adam, rtol=0, atol=1e-6)


def test_a_gradient_that_says_nothing_leaves_the_moments() -> None:
    optimizer, p = optimizer_of(MLorc(Frame(2)), normal(6, 12))
    p.grad = normal(6, 12, seed=1)
    optimizer.step()
    held = {key: x.clone() for key, x in optimizer.state[p].items()}
    before = p.detach().clone()
    p.grad = torch.full((6, 12), torch.nan)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert all(torch.equal(x, held[key]) for key, x in optimizer.state[p].items())


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (9, 7), (31,)])
def test_bytes_are_those_of_the_closed_form(shape: tuple[int, ...]) -> None:
    m, n = shape if len(shape) == 2 else (1, *shape)
    expected = 8 * min(4, m, n) * (m + n) + 4
    assert lowmem.state_bytes(lowmem.create("mlorc"), shape) == expected


def test_what_is_out_of_range_is_refused() -> None:
    for make in (lambda: MLorc(Frame(0)), lambda: MLorc(Frame(4), 0)):
        with pytest.raises(UserError):
            make()
