"""Q-GaLore's basis (arXiv 2407.08296), against a transcription that loops over its numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.memory.count import state_bytes, workspace_bytes
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.lazy import Lazy, dequantized, quantized
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.sources import Backprop
from tests.oracles.low_rank.reference_subspaces import Adam as ReferenceAdam
from tests.oracles.low_rank.test_subspaces import (
    BETAS,
    EPS,
    LR,
    normal,
    optimizer_of,
    through_a_checkpoint,
)


def rounded(basis: Tensor) -> Tensor:
    """Each number at the nearest of 16 levels between the least and the largest of its group."""
    flat = basis.double().mT.reshape(-1).tolist()
    out: list[float] = []
    for start in range(0, len(flat), 256):
        group = flat[start : start + 256]
        ends = group + [0.0] * (len(group) < 256)  # the tail is filled up with zeros
        low, step = min(ends), (max(ends) - min(ends)) / 15
        out += [low + step * round((x - low) / step) for x in group]
    return torch.tensor(out, dtype=torch.float64).view(basis.shape[1], basis.shape[0]).mT


@pytest.mark.parametrize("shape", [(64, 5), (256, 3), (7, 3), (100, 8), (1, 1)])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_four_bits_are_the_nearest_levels(shape: tuple[int, int], shift: float) -> None:
    """Also of numbers of one sign, where a clamped zero point loses them."""
    basis = normal(*shape) + shift
    held = quantized(basis)
    got = dequantized(held, *shape).double()
    off = (got - rounded(basis)).abs().amax()
    assert off < 1e-5
    assert held["codes"].numel() == -(-basis.numel() // 2)
    if abs(shift) == 3.0 and basis.numel() > 256:
        assert off < released_error(basis) / 1000


def released_error(basis: Tensor) -> float:
    """What the released code makes of it: a zero point that is one of the sixteen codes."""
    groups = basis.mT.reshape(-1)[:256].double()
    step = (groups.max() - groups.min()) / 15
    zero = (-groups.min() / step).round().clamp(0, 15)
    codes = ((groups / step).round() + zero).clamp(0, 15)
    return float(((codes - zero) * step - groups).abs().amax())


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_step_in_the_rounded_basis(side: str) -> None:
    """At gap 1 and gradients of one subspace, the basis is replaced at steps 0 to 5, then after 2, 4, ..."""
    start = normal(6, 12)
    rule = Subspace(Lazy(Frame(3), update_proj_gap=1), coded(Adam()), scale=0.25)
    turned = (lambda x: x) if side == "left" else (lambda x: x.mT.contiguous())
    optimizer, p = optimizer_of(rule, turned(start))
    adam, w, gaps = ReferenceAdam(BETAS, EPS), start.double(), []
    u = normal(6, 3, seed=40)
    for t in range(16):
        g = u @ normal(3, 12, seed=t + 1)
        p.grad = turned(g)
        optimizer.step()
        state = {key[10:]: x for key, x in optimizer.state[p].items() if key.startswith("projector.")}
        gaps.append(int(state["gap"]))
        basis = dequantized(state, 6, 3).double()
        w = w - LR * 0.25 * basis @ adam.direction(basis.mT @ g.double())
        torch.testing.assert_close(turned(p.detach()).double(), w, rtol=0, atol=5e-6)
    assert gaps == [1] * 5 + [2] * 2 + [4] * 4 + [8] * 5


def test_a_subspace_that_changes_is_followed() -> None:
    """Unrelated directions in 64 dimensions: the gap stays 1 and the basis moves in every step."""
    optimizer, p = optimizer_of(Subspace(Lazy(Frame(2), update_proj_gap=1), coded(Adam())), normal(64, 80))
    seen = []
    for t in range(12):
        p.grad = normal(64, 2, seed=2 * t + 1) @ normal(2, 80, seed=2 * t + 2)
        optimizer.step()
        seen.append(optimizer.state[p]["projector.codes"].clone())
    assert int(optimizer.state[p]["projector.gap"]) == 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(("side", "rank"), [(8, 4), (64, 32), (12, 9)])
def test_unrelated_subspaces_are_not_alike_however_much_of_the_side_they_take(side: int, rank: int) -> None:
    """Their similarity is r / s by chance alone, above the threshold of 0.4: the basis is replaced anyway."""
    rule = Subspace(Lazy(Frame(rank), update_proj_gap=1), coded(Adam()))
    optimizer, p = optimizer_of(rule, normal(side, 80))
    for t in range(12):
        p.grad = normal(side, rank, seed=2 * t + 1) @ normal(rank, 80, seed=2 * t + 2)
        optimizer.step()
    assert int(optimizer.state[p]["projector.gap"]) == 1
    assert float(optimizer.state[p]["projector.similarity"].mean()) > 0.4


def test_a_basis_of_the_whole_side_is_always_alike() -> None:
    optimizer, p = optimizer_of(Subspace(Lazy(Frame(6), update_proj_gap=1), coded(Adam())), normal(6, 12))
    for t in range(12):
        p.grad = normal(6, 12, seed=t + 1)
        optimizer.step()
    assert int(optimizer.state[p]["projector.gap"]) == 8


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_the_basis_stays_where_a_gradient_tells_nothing(bad: float) -> None:
    optimizer, p = optimizer_of(Subspace(Lazy(Frame(3), update_proj_gap=1), coded(Adam())), normal(6, 12))
    p.grad = normal(6, 12, seed=1)
    optimizer.step()
    before = {key: x.clone() for key, x in optimizer.state[p].items() if key.startswith("projector")}
    p.grad = torch.full((6, 12), bad)
    optimizer.step()
    assert all(torch.equal(optimizer.state[p][key], x) for key, x in before.items())


@pytest.mark.parametrize("stop", [2, 6, 7])
@pytest.mark.parametrize("shape", [(6, 12), (300, 7)])
def test_what_resumes_ends_where_it_would_have(stop: int, shape: tuple[int, int]) -> None:
    """Bit for bit; and what is planned is what is held."""
    rule = Subspace(Lazy(Frame(3), update_proj_gap=2), coded(Adam(), "int8"), on_refresh="keep")
    resumed, p = through_a_checkpoint(rule, shape, 12, stop)
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    held, numbers, moments = sum(x.nbytes for x in resumed.state[p].values()), 3 * min(shape), 3 * max(shape)
    basis = -(-numbers // 2) + 8 * -(-numbers // 256) + 28
    assert state_bytes(strategy, shape) == held == basis + 2 * (moments + 4 * -(-moments // 256)) + 4


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="threshold must be above 0"):
        Lazy(Frame(2), threshold=0.0)


@pytest.mark.parametrize("shape", [(2048, 5504), (5504, 2048)])
@pytest.mark.parametrize("gap", [1, 200])
def test_a_step_takes_no_more_than_is_declared(shape: tuple[int, int], gap: int) -> None:
    rule = Subspace(Lazy(Frame(512), update_proj_gap=gap), coded(Adam(), "int8"))
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    taken = workspace_bytes(strategy, shape, torch.bfloat16, "matrix", refresh=False)
    assert taken <= rule.scratch(shape) + 12 * 512 * 2048 * (gap == 1), f"{taken / 2**20:.0f} MiB"
