"""SMMF: the paper in double precision, its exact cases, its bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.rules.compact.smmf import SMMF, packed, signs, square
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from tests.oracles import drive
from tests.oracles.normalised.reference_normalised import Reference
from tests.oracles.normalised.test_normalised import optimizer_of, stepped


def factors(x: Tensor) -> Tensor:
    """The outer product that a non-negative matrix is held by."""
    return torch.outer(x.sum(1), x.sum(0)) / x.sum().clamp(min=1e-300)


class Paper(Reference):
    """arXiv 2412.08894; `factored` False leaves the moments whole."""

    factored = True

    def direction(self, g: Tensor) -> Tensor:
        count = g.numel()
        columns = max(i for i in range(1, math.isqrt(count) + 1) if count % i == 0)
        flat = g.reshape(count // columns, columns)
        if self.t == 1:
            self.m, self.v = torch.zeros_like(flat), torch.zeros_like(flat)
        beta1, beta2 = 0.9 * 0.999 ** (self.t - 1), 1 - self.t**-0.8
        m, v = beta1 * self.m + (1 - beta1) * flat, beta2 * self.v + (1 - beta2) * flat**2
        sign = torch.where(m > 0, 1.0, -1.0)
        self.m, self.v = (sign * factors(m.abs()), factors(v)) if self.factored else (m, v)
        return (m / (v.sqrt() + 1e-8)).view_as(g)


class Whole(Paper):
    factored = False


@pytest.mark.parametrize("shape", [(37, 53), (48, 20), (4, 3, 5, 2), (24,), (1,), (1999, 1000)])
def test_the_paper_in_double_precision(shape: tuple[int, ...]) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = Paper(start, 0.01, 0.1)
    got = stepped(SMMF(), start, grads, lr=0.01, weight_decay=0.1)
    for g in grads:
        expected = truth.step(g)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_a_prime_number_of_elements_loses_nothing() -> None:
    start, grads = drive.start_of((101,)), drive.gradients((101,), 10)
    truth = Whole(start, 0.01, 0.0)
    got = stepped(SMMF(), start, grads, lr=0.01)
    for g in grads:
        expected = truth.step(g)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


def test_moments_of_rank_one_lose_nothing() -> None:
    a, b = torch.rand(12) + 0.1, torch.rand(12) + 0.1
    g = torch.outer(a, b) * torch.randn(12, 12).sign()
    truth = Whole(torch.zeros(12, 12), 0.01, 0.0)
    for _ in range(6):
        expected = truth.step(g)
    got = stepped(SMMF(), torch.zeros(12, 12), [g] * 6, lr=0.01)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_the_first_step_is_a_tenth_of_the_sign() -> None:
    g = drive.gradients((6, 9), 1)[0]
    moved = stepped(SMMF(), torch.zeros(6, 9), [g], lr=0.01, eps=1e-30)
    torch.testing.assert_close(moved, -1e-3 * g.sign(), rtol=1e-5, atol=0)


def test_the_most_square_shapes() -> None:
    known = {4096**2: (4096, 4096), 32000 * 4096: (12800, 10240), 50257 * 768: (6932, 5568), 7919: (7919, 1)}
    assert {count: square(count) for count in known} == known


@pytest.mark.parametrize("count", range(1, 66))
def test_signs_survive_packing(count: int) -> None:
    positive = torch.randn(count) > 0
    bits = packed(positive)
    assert len(bits) == -(-count // 8)
    for start in {0, count // 3, count - 1}:
        assert torch.equal(signs(bits, start, count) > 0, positive[start:])


def test_what_is_not_finite_or_too_large_is_refused() -> None:
    start, g = torch.ones(6, 9), drive.gradients((6, 9), 1)[0]
    optimizer, p = optimizer_of(SMMF(), start, lr=0.1)
    p.grad = g
    optimizer.step()
    before, held = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    for bad in (torch.nan, torch.inf, 1e30):
        p.grad = g.clone()
        p.grad[1, 1] = bad
        optimizer.step()
        assert torch.equal(p.detach(), before)
        assert all(torch.equal(v, held[k]) for k, v in optimizer.state[p].items())
    assert torch.equal(stepped(SMMF(), start, [torch.zeros(6, 9)] * 3, lr=0.1), start)


@pytest.mark.parametrize("shape", [(4096, 11008), (32000, 4096), (4097,), (7,), (3, 5, 7)])
def test_what_is_held(shape: tuple[int, ...]) -> None:
    count, (a, b) = math.prod(shape), square(math.prod(shape))
    strategy = Strategy(rules={"matrix": SMMF(), "other": SMMF()}, source=Backprop())
    role = "convolution" if len(shape) > 2 else "matrix"  # a stack would be held matrix by matrix
    assert lowmem.state_bytes(strategy, shape, role=role) == -(-count // 8) + 8 * (a + b) + 4
    if shape == (4096, 11008):
        assert lowmem.state_bytes(strategy, shape) / count < 0.128


def test_planned_bytes_are_held() -> None:
    strategy = Strategy(rules={"matrix": SMMF(), "other": SMMF()}, source=Backprop())
    optimizer, p = optimizer_of(SMMF(), torch.zeros(20, 31), lr=0.1)
    p.grad = torch.ones(20, 31)
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[p].values()) == lowmem.state_bytes(strategy, (20, 31))


def test_numbers_outside_their_range() -> None:
    with pytest.raises(UserError, match=r"decay_rate must be below 0, got 0\.0; growth_rate must be in"):
        SMMF(decay_rate=0.0, growth_rate=1.5)
