"""Rules that make singular values equal: known answers, their papers in double precision, invariants.

Known answers as in test_normalised: three steps from W0[i][j] = cos(1 + 2i + 3j) / 2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.memory import count
from lowmem.optim.rules.muon import newton_schulz
from tests.oracles import drive
from tests.oracles import reference_orthonormal as reference
from tests.oracles.test_normalised import gradient_of, matrix, weight_of

ANSWERS: list[tuple[str, dict[str, Any], dict[str, float], str]] = [
    (
        "swan", {}, {"lr": 0.01},
        "0.268864 -0.293839 0.349920 -0.424199; -0.468901 0.443020 -0.444197 0.421529;"
        "0.144793 -0.064872 0.007924 0.051817",
    ),
    (
        "swan", {}, {"lr": 0.01},
        "0.272575 -0.298242 0.345948; -0.470052 0.441240 -0.441664; 0.133774 -0.058173 -0.004306;"
        "0.400658 -0.446489 0.456970",
    ),
    (
        "muon_8bit", {}, {"lr": 0.02, "weight_decay": 0.1},
        "0.265822 -0.313645 0.369451 -0.426608; -0.484374 0.466849 -0.444707 0.417127;"
        "0.155339 -0.058847 0.014389 0.074480",
    ),
    (
        "muon_8bit", {}, {"lr": 0.02, "weight_decay": 0.1},
        "0.265990 -0.313417 0.368593; -0.484833 0.465496 -0.444777; 0.154308 -0.059071 0.012917;"
        "0.382217 -0.427631 0.445625",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "hyper", "answer"), ANSWERS)
def test_known_answers(name: str, options: dict[str, Any], hyper: dict[str, float], answer: str) -> None:
    expected = matrix(answer)
    shape = (expected.shape[0], expected.shape[1])
    grads = [gradient_of(shape, t) for t in (1, 2, 3)]
    got = drive.follow(name, weight_of(shape).float(), grads, hyper=hyper, **options)[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_swan_is_the_paper(shape: tuple[int, int]) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 3)
    truth = reference.SWAN(start, 0.1, 0.1)
    ours = drive.follow("swan", start, grads, hyper={"lr": 0.1, "weight_decay": 0.1}, iterations=14)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=2e-4)


def test_swan_moves_by_one_rms_and_knows_no_size() -> None:
    g = drive.gradients((8, 30), 1)[0]
    ends = [
        drive.follow("swan", torch.zeros(8, 30), [c * g], hyper={"lr": 1.0})[0] for c in (1.0, 1e-25, 1e25)
    ]
    assert float(ends[0].square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-4)


def test_swan_leaves_rows_of_equal_elements() -> None:
    g = drive.gradients((6, 9), 1)[0]
    g[2], g[4] = 0.3, 0.0
    moved = drive.follow("swan", torch.zeros(6, 9), [g], hyper={"lr": 1.0})[0]
    assert not moved[2].any()
    assert not moved[4].any()
    assert moved.isfinite().all()
    column = torch.ones(6, 1)
    assert torch.equal(drive.follow("swan", column, [g[:, :1]], hyper={"lr": 1.0})[0], column)


@pytest.mark.parametrize("shape", [(60, 70), (70, 60)])
def test_muon_8bit_is_the_paper(shape: tuple[int, int]) -> None:
    """More than one block; a code that rounding puts next door is 1 / 254 of the largest element."""
    start, grads = drive.start_of(shape), drive.gradients(shape, 5)
    truth = reference.Muon8bit(start, 0.02, 0.1, 0.95)
    ours = drive.follow("muon_8bit", start, grads, hyper={"lr": 0.02, "weight_decay": 0.1})
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=5e-5)


def test_linear_codes_are_of_8_bits() -> None:
    with pytest.raises(UserError, match="codes='linear' are of states='int8', got 'fp32'"):
        lowmem.create("muon_8bit", states="fp32")


@pytest.mark.parametrize(("name", "size"), [("swan", 0), ("muon_8bit", 3600 + 4 * 2)])
def test_what_is_held(name: str, size: int) -> None:
    """On meta and in fact; a stack is so many matrices."""
    held: list[int] = []

    def watch(optimizer: Any, p: Tensor) -> None:
        held.append(sum(x.nbytes for x in optimizer.state[p].values()))

    for shape, many in (((60, 60), 1), ((2, 60, 60), 2)):
        drive.follow(name, torch.zeros(shape), [torch.ones(shape)], watch=watch, hyper={"lr": 0.1})
        assert lowmem.state_bytes(lowmem.create(name), shape) == held.pop() == many * size


def test_newton_and_schulz_tell_the_size_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether products are made at once or in panels."""
    x = torch.randn(5, 8)
    for panel in (1 << 22, 10):
        monkeypatch.setattr("lowmem.optim.rules.muon.PANEL", panel)
        t, p, a = newton_schulz(x @ x.mT, x.norm(), [(1.5, -0.5, 0.0)] * 3)
        torch.testing.assert_close(p @ a @ p, t @ x @ x.mT @ t.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "swan"])
def test_three_matrices_of_the_short_side_are_all(name: str) -> None:
    """Large enough for the rest of the workspace not to hide a fourth."""
    strategy, shape = lowmem.create(name), (6144, 8192)
    taken = count.workspace_bytes(strategy, shape, torch.bfloat16, "matrix", False)
    assert taken <= strategy.rules["matrix"].scratch(shape) == (64 << 20) + 12 * 6144**2
