"""AdamP and DoG: known answers, their papers in double precision, and what they must leave alone.

The answers: three gradients of a weight of two, [1, -1] at first, learning rate 0.1 or 1; those of published
code.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import coded
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.measured.overall import LDoG
from lowmem.optim.rules.measured.weighed import AdamP
from tests.oracles import drive
from tests.oracles.dense import reference_rules as reference
from tests.oracles.normalised.test_normalised import optimizer_of, stepped

GRADIENTS = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[-1.5, 3.0]])]
ADAM = [[0.900000001, -0.9000000005], [0.8067820383, -0.8427465433], [0.814979718, -0.8711237759]]
FREE = [[0.900000001, -0.9000000005], [0.8820177471, -0.9179822521], [0.8902154268, -0.9463594846]]
DECAYED = [[0.89, -0.89], [0.87112775, -0.90709225], [0.87061415, -0.92639856]]
FAR = [[0.8920330874, -0.7840661747], [0.8396614421, -0.8102519974], [0.9312235516, -0.9933762164]]
NEAR = [[0.9999989203, -0.9999978407], [0.9999983966, -0.9999981025], [0.9999993122, -0.9999999338]]


@pytest.mark.parametrize(
    ("rule", "lr", "decay", "answers"),
    [
        (AdamP.of("fp32"), 0.1, 0.0, ADAM),
        (AdamP.of("fp32", delta=1.0), 0.1, 0.0, FREE),
        (AdamP.of("fp32", delta=1.0), 0.1, 0.1, DECAYED),
        (LDoG(reps_rel=0.1), 1.0, 0.0, FAR),
        (LDoG(), 1.0, 0.0, NEAR),
    ],
)
def test_known_answers(rule: AnyRule, lr: float, decay: float, answers: list[list[float]]) -> None:
    for steps in (1, 2, 3):
        start = torch.tensor([[1.0, -1.0]])
        got = stepped(rule, start, GRADIENTS[:steps], lr=lr, weight_decay=decay, betas=(0.9, 0.999))
        torch.testing.assert_close(got, torch.tensor([answers[steps - 1]]), rtol=0, atol=3e-7)


def turning(w: Tensor, rows: bool) -> list[Tensor]:
    """Ordinary gradients, and some at right angles to the first weight: row by row, or as a whole."""
    grads = drive.gradients(w.shape, 6)
    for g in grads[1::2]:
        along = (g * w).sum(1, keepdim=True) if rows else (g * w).sum()
        g -= w * along / (w.square().sum(1, keepdim=True) if rows else w.square().sum())
    return grads


@pytest.mark.parametrize("rows", [True, False])
def test_adamp_in_double_precision(rows: bool) -> None:
    start = drive.start_of((5, 8))
    truth = reference.AdamP(start, 1e-3, 0.1)
    for g in (grads := turning(start, rows)):
        expected = truth.step(g)
    assert ("rows" if rows else "all") in truth.fired
    assert len(truth.fired) < 6
    got = stepped(AdamP.of("fp32"), start, grads, lr=1e-3, weight_decay=0.1)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_adamp_keeps_lengths_of_rows_that_are_free() -> None:
    """To first order: the step has nothing of the weight in it."""
    start = drive.start_of((5, 8))
    along = []
    for rule in (AdamP.of("fp32"), coded(Adam())):
        moved = stepped(rule, start, [turning(start, rows=True)[1]], lr=1e-2) - start
        along.append(float((moved * start).sum(1).abs().max()))
    assert along[0] < 1e-4 * along[1]


def test_dog_in_double_precision() -> None:
    start, grads = drive.start_of((7, 9)), drive.gradients((7, 9), 12)
    truth = reference.DoG(start, 1.0, 0.1)
    truth.reps_rel = 1e-2
    for g in grads:
        expected = truth.step(g)
    got = stepped(LDoG(1e-2), start, grads, lr=1.0, weight_decay=0.1)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_dog_does_not_know_the_size_of_the_gradient() -> None:
    start, grads = drive.start_of((7, 9)), drive.gradients((7, 9), 5)
    one = stepped(LDoG(1e-2), start, grads, lr=1.0)
    for size in (1e-15, 1e12):
        other = stepped(LDoG(1e-2), start, [size * g for g in grads], lr=1.0)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [AdamP.of("fp32"), LDoG(1e-2)])
def test_what_says_nothing_begins_nothing(rule: AnyRule) -> None:
    """A gradient of zeros stands at right angles to nothing, and one that is not finite is not taken."""
    start, g = drive.start_of((6, 9)), drive.gradients((6, 9), 1)[0]
    bad = g.clone()
    bad[1, 1] = torch.nan
    decay = 0.0 if rule.own_decay else 0.1
    optimizer, p = optimizer_of(rule, start, lr=0.01, weight_decay=decay)
    for gradient in (bad, torch.zeros_like(g), g):
        p.grad = gradient.clone()
        before = p.detach().clone()
        optimizer.step()
        if gradient is bad:
            assert torch.equal(p, start)
        elif gradient is not g:
            torch.testing.assert_close(p.detach(), (1.0 - 0.01 * decay) * before, rtol=1e-6, atol=0)
    assert not torch.equal(p, before)
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


def test_dog_counts_from_where_it_began_after_a_resume() -> None:
    start, grads = drive.start_of((7, 9)).bfloat16(), drive.gradients((7, 9), 4)
    one, p = optimizer_of(LDoG(0.3), start, lr=1.0)
    for g in grads[:2]:
        p.grad = g.bfloat16()
        one.step()
    assert one.state[p]["initial"].dtype == torch.bfloat16
    assert torch.equal(one.state[p]["initial"], start)
    other, q = optimizer_of(LDoG(0.3), p.detach(), lr=1.0)
    other.load_state_dict(one.state_dict())
    for g in grads[2:]:
        p.grad, q.grad = g.bfloat16(), g.bfloat16()
        one.step()
        other.step()
    assert torch.equal(p, q)


def test_they_are_refused_inside_a_subspace() -> None:
    for rule in ("adamp", "dog"):
        with pytest.raises(
            UserError, match="reads the weight cannot step inside a subspace; take projector=none"
        ):
            lowmem.create("galore", rule=rule)


def test_numbers_outside_their_range() -> None:
    for make, words in ((lambda: AdamP.of("fp32", delta=0.0), "delta > 0"), (lambda: LDoG(0.0), "above 0")):
        with pytest.raises(UserError, match=words):
            make()
