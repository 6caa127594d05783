"""Rules that normalise a matrix: known answers, their papers in double precision, and their invariants.

The known answers: W0[i][j] = cos(1 + 2i + 3j) / 2, G_t[i][j] = sin((i + 1)(2j + 1) + t), three steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.contract import AnyRule
from lowmem.optim.rules.normalised.rows import Scaled, SinkGD
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from tests.oracles import drive
from tests.oracles.normalised import reference_normalised as reference

SHAPES = [(3, 4), (4, 3)]


def weight_of(shape: tuple[int, int]) -> Tensor:
    i, j = torch.arange(shape[0]).double()[:, None], torch.arange(shape[1]).double()
    return torch.cos(1 + 2 * i + 3 * j) / 2


def gradient_of(shape: tuple[int, int], t: int) -> Tensor:
    i, j = torch.arange(shape[0]).double()[:, None], torch.arange(shape[1]).double()
    return torch.sin((i + 1) * (2 * j + 1) + t)


def optimizer_of(rule: AnyRule, w: Tensor, **hyper: Any) -> tuple[lowmem.LowMemOptimizer, nn.Parameter]:
    p = nn.Parameter(w.clone())
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    return lowmem.LowMemOptimizer([{"params": [("w", p)], "role": "matrix"}], strategy, **hyper), p


def stepped(rule: AnyRule, w: Tensor, grads: list[Tensor], **hyper: Any) -> Tensor:
    optimizer, p = optimizer_of(rule, w, **hyper)
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p.detach()


def matrix(text: str) -> Tensor:
    return torch.tensor([[float(x) for x in row.split()] for row in text.split(";")])


ANSWERS: list[tuple[str, AnyRule, float, str]] = [
    (
        "sinkgd", SinkGD(), 0.2,
        "0.267930 -0.297727 0.354697 -0.436089; -0.469114 0.450268 -0.435874 0.428479;"
        "0.170321 -0.040996 0.028839 0.091650",
    ),
    (
        "sinkgd", SinkGD(), 0.2,
        "0.265368 -0.298380 0.353775; -0.468250 0.452856 -0.436702; 0.169862 -0.043380 0.030274;"
        "0.387554 -0.450810 0.450344",
    ),
    (
        "rows", Scaled(), 0.01,
        "0.266398 -0.296743 0.354546 -0.429671; -0.471705 0.449242 -0.437567 0.428323;"
        "0.171269 -0.042699 0.029631 0.090997",
    ),
    (
        "rows", Scaled(), 0.01,
        "0.264594 -0.297119 0.356663; -0.471120 0.450254 -0.439475; 0.169674 -0.042994 0.030661;"
        "0.383807 -0.449338 0.453416",
    ),
    (
        "columns", Scaled(columns=True), 0.01,
        "0.264623 -0.298012 0.358369 -0.433371; -0.471657 0.448880 -0.436466 0.427887;"
        "0.169741 -0.041425 0.029720 0.094150",
    ),
    (
        "columns", Scaled(columns=True), 0.01,
        "0.265936 -0.297978 0.356992; -0.469809 0.449402 -0.436591; 0.170426 -0.042493 0.031025;"
        "0.383477 -0.448511 0.451105",
    ),
    (
        "head", Scaled.of("fp32", momentum=0.9), 0.01,
        "0.248640 -0.286976 0.364175 -0.447451; -0.478383 0.441079 -0.420218 0.413806;"
        "0.178966 -0.039771 0.027558 0.084086",
    ),
    (
        "head", Scaled.of("fp32", momentum=0.9), 0.01,
        "0.247033 -0.286777 0.365616; -0.480243 0.444431 -0.422740; 0.175638 -0.042434 0.025774;"
        "0.401759 -0.452879 0.436494",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rule", "lr", "answer"), ANSWERS)
def test_known_answers(name: str, rule: AnyRule, lr: float, answer: str) -> None:
    expected = matrix(answer)
    shape = (expected.shape[0], expected.shape[1])
    grads = [gradient_of(shape, t) for t in (1, 2, 3)]
    # the decay of the answers is 0.1 of the rms of a step
    decay = 0.1 * 0.01 / lr
    got = stepped(rule, weight_of(shape).float(), grads, lr=lr, weight_decay=decay)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


Made = Callable[[Tensor], reference.Reference]
PAPERS: dict[str, tuple[AnyRule, Made]] = {
    "sinkgd": (SinkGD(), lambda w: reference.SinkGD(w, 0.1, 0.1)),
    "rows": (Scaled(), lambda w: reference.SCALE(w, 0.1, 0.1, 0.0, 1)),
    "columns": (Scaled(columns=True), lambda w: reference.SCALE(w, 0.1, 0.1, 0.0, 0)),
    "head": (Scaled.of("fp32", momentum=0.9), lambda w: reference.SCALE(w, 0.1, 0.1, 0.9, 1)),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (1, 19), (1100, 1000)])
def test_the_paper_in_double_precision(name: str, shape: tuple[int, int]) -> None:
    rule, paper = PAPERS[name]
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = paper(start)
    got = stepped(rule, start, grads, lr=0.1, weight_decay=0.1)
    for g in grads:
        expected = truth.step(g)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", PAPERS)
def test_the_size_of_a_gradient_does_not_matter(name: str) -> None:
    rule, start, g = PAPERS[name][0], torch.zeros(6, 9), drive.gradients((6, 9), 1)[0]
    ends = [stepped(rule, start, [g * size], lr=0.1) for size in (1.0, 1e-25, 1e25)]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PAPERS)
def test_zeros_stand_still_and_what_is_not_finite_is_refused(name: str) -> None:
    start, g = torch.ones(6, 9), drive.gradients((6, 9), 1)[0]
    assert torch.equal(stepped(PAPERS[name][0], start, [torch.zeros(6, 9)], lr=0.1), start)
    g[2], g[:, 3] = 0.0, 0.0
    moved = stepped(PAPERS[name][0], start, [g], lr=0.1)
    assert torch.equal(moved[2], start[2])
    assert torch.equal(moved[:, 3], start[:, 3])
    assert moved.isfinite().all()
    g[0, 0] = torch.inf
    optimizer, p = optimizer_of(PAPERS[name][0], start, lr=0.1)
    p.grad = g
    optimizer.step()
    assert torch.equal(p.detach(), start)
    assert optimizer.nonfinite() == 54


def test_sinkgd_moves_columns_by_one_rms() -> None:
    """Columns exactly, rows nearly."""
    moved = stepped(SinkGD(), torch.zeros(30, 70), drive.gradients((30, 70), 1), lr=1.0)
    torch.testing.assert_close(moved.square().mean(0).sqrt(), torch.full((70,), 0.05), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((30,), 0.05), rtol=1e-3, atol=0)


def test_what_is_held() -> None:
    """Nothing for a matrix; a head's momentum in any precision."""
    held = {
        0: [SinkGD(), Scaled(), Scaled(columns=True)],
        4 * 600: [Scaled.of("fp32", momentum=0.9)],
        600 + 4 * 3: [Scaled.of("int8", momentum=0.9)],
    }
    for size, rules in held.items():
        for rule in rules:
            optimizer, p = optimizer_of(rule, torch.zeros(20, 30), lr=0.1)
            p.grad = torch.ones(20, 30)
            optimizer.step()
            assert sum(x.nbytes for x in optimizer.state[p].values()) == size
            planned = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
            assert lowmem.state_bytes(planned, (20, 30)) == size


def test_numbers_outside_their_range() -> None:
    with pytest.raises(UserError, match="iterations must be at least 1, got 0; alpha must be above 0"):
        SinkGD(iterations=0, alpha=0.0)
    with pytest.raises(UserError, match="momentum must be in"):
        Scaled.of("fp32", momentum=1.0)
