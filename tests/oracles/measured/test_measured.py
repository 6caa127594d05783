"""Rules that measure a tensor first, or follow a second path: their papers in double precision, answers.

The answers: three gradients of a vector of two, learning rate 0.1, no decay; those of published code, where
there is any.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.errors import UserError
from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import coded
from lowmem.optim.evaluated import evaluated
from lowmem.optim.rules.elementwise.paths import INNAprop, ScheduleFree
from lowmem.optim.rules.measured.measured import MARS, FAdam, Gravity
from lowmem.optim.rules.measured.momenta import TAM, CriticalAdam
from tests.oracles import drive
from tests.oracles.dense import reference_rules as reference
from tests.oracles.normalised.test_normalised import optimizer_of, stepped

GRADIENTS = [[1.0, -2.0], [0.5, 0.25], [-1.5, 3.0]]
RULES: dict[str, tuple[AnyRule, type[reference.Reference], tuple[float, float]]] = {
    "innaprop": (coded(INNAprop()), reference.INNAprop, (0.9, 0.999)),
    "schedule_free": (coded(ScheduleFree()), reference.ScheduleFree, (0.9, 0.999)),
    "mars": (MARS.of("fp32"), reference.MARS, (0.95, 0.99)),
    "fadam": (FAdam.of("fp32"), reference.FAdam, (0.9, 0.999)),
    "gravity": (Gravity.of("fp32"), reference.Gravity, (0.9, 0.999)),
    "tam": (TAM.of("fp32"), reference.TAM, (0.9, 0.999)),
    "adatam": (TAM.of("fp32", adaptive=True), reference.AdaTAM, (0.9, 0.999)),
    "adam_cm": (CriticalAdam.of("fp32"), reference.CriticalAdam, (0.9, 0.999)),
}
ANSWERS = {
    "innaprop": [[0.9100000009, -0.9100000004], [0.8439704595, -0.9166908734], [0.9541686304, -1.038646862]],
    "schedule_free": [
        [0.900000001, -0.9000000005], [0.8652097256, -0.9096499784], [0.9112607487, -0.9697788374],
    ],
    "mars": [[0.9000000022, -0.9000000011], [0.8076839022, -0.9071587747], [0.7994227901, -0.9451905063]],
    "fadam": [[0.9900000002, -0.9900000001], [0.9746744957, -0.9827545416], [0.97070687, -0.9864053015]],
    "gravity": [
        [0.9926666667, -0.9956862745], [0.9734156863, -1.000051282], [0.9610052549, -1.004232607],
    ],
    "tam": [[0.949999999, -0.899999998], [0.8799999976, -0.8224999964], [0.8847736135, -0.8882972294]],
}  # fmt: skip


def follow(name: str, grads: Any, start: torch.Tensor, lr: float, **hyper: Any) -> torch.Tensor:
    rule, _, betas = RULES[name]
    return stepped(rule, start, grads, lr=lr, betas=betas, eps=reference.EPS, **hyper)


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers(name: str) -> None:
    for steps in (1, 2, 3):
        grads = [torch.tensor(g) for g in GRADIENTS[:steps]]
        got = follow(name, grads, torch.tensor([1.0, -1.0]), 0.1)
        torch.testing.assert_close(got, torch.tensor(ANSWERS[name][steps - 1]), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", RULES)
def test_the_paper_in_double_precision(name: str) -> None:
    """Gradients of both sides of norm 1, and more of them than momenta are kept."""
    start, grads = (
        drive.start_of((7, 9)),
        [g * 3.0 ** (t % 5 - 3) for t, g in enumerate(drive.gradients((7, 9), 14))],
    )
    truth = RULES[name][1](start, 1e-2, 0.0)
    for g in grads:
        expected = truth.step(g)
    torch.testing.assert_close(follow(name, grads, start, 1e-2).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", RULES)
def test_neither_zeros_nor_what_is_not_finite_break_it(name: str) -> None:
    optimizer, p = optimizer_of(RULES[name][0], drive.start_of((6, 9)), lr=0.01)
    for t, g in enumerate(drive.gradients((6, 9), 6)):
        p.grad = (torch.zeros_like(g), g, g * 1e20, g, g * 1e-30, g)[t].clone()
        p.grad[0, 0] = torch.nan if t == 3 else p.grad[0, 0]
        optimizer.step()
    assert all(value.isfinite().all() for value in (p, *optimizer.state[p].values()))


def test_schedule_free_averages_its_base() -> None:
    """The point that is evaluated, from the weights and the distance that is held."""
    start, grads, lr = drive.start_of((4, 5)), drive.gradients((4, 5), 9), 0.03
    optimizer, p = optimizer_of(coded(ScheduleFree(warmup=4)), start, lr=lr)
    truth = reference.ScheduleFree(start, lr, 0.0)
    truth.warmup = 4
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        expected = truth.step(g)
    torch.testing.assert_close(p.detach().double(), expected, rtol=2e-6, atol=2e-6)
    before = p.detach().clone()
    with evaluated(optimizer):
        torch.testing.assert_close(p.detach().double(), truth.x, rtol=2e-6, atol=2e-6)
    assert torch.equal(p, before)


def test_innaprop_with_friction_one_is_rmsprop() -> None:
    start, grads = drive.start_of((4, 5)), drive.gradients((4, 5), 5)
    ours = stepped(coded(INNAprop(alpha=2.0, beta=0.5)), start, grads, lr=0.1, betas=(0.9, 0.99))
    theirs = torch.nn.Parameter(start.clone())
    peer = torch.optim.AdamW([theirs], lr=0.05, betas=(0.0, 0.99), weight_decay=0.0)
    for g in grads:
        theirs.grad = g
        peer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=2e-6)


def test_mars_without_correction_and_below_norm_one_is_adam() -> None:
    start, grads = drive.start_of((4, 5)), drive.gradients((4, 5), 5, scale=1e-2)
    theirs = torch.nn.Parameter(start.clone())
    peer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.95, 0.99), weight_decay=0.0)
    for g in grads:
        theirs.grad = g
        peer.step()
    ours = stepped(MARS.of("fp32", gamma=0.0), start, grads, lr=0.1, betas=(0.95, 0.99))
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=2e-6)


def test_mars_remembers_a_copy_of_the_gradient() -> None:
    """Published code remembers the tensor, which zeroing in place empties."""
    start, grads = drive.start_of((4, 5)), drive.gradients((4, 5), 3, scale=1e-2)
    optimizer, p = optimizer_of(MARS.of("fp32"), start, lr=0.1, betas=(0.95, 0.99))
    p.grad = torch.empty_like(p)
    for g in grads:
        p.grad.copy_(g)
        optimizer.step()
        p.grad.zero_()
    torch.testing.assert_close(p.detach(), follow("mars", grads, start, 0.1), rtol=0, atol=0)


def test_fadam_keeps_eps_where_nothing_has_a_gradient() -> None:
    """The paper's floor is then 0, and the quotient 0 / 0; a size of gradients changes nothing."""
    start, grads = drive.start_of((4, 5)), drive.gradients((4, 5), 4)
    one = follow("fadam", grads, start, 0.1)
    other = follow("fadam", [1e-3 * g for g in grads], start, 0.1)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    still = follow("fadam", [torch.zeros(4, 5)] * 2, start, 0.1)
    assert torch.equal(still, start)


def test_gravity_of_small_gradients_is_momentum() -> None:
    optimizer, p = optimizer_of(Gravity.of("fp32"), torch.zeros(3), lr=1.0)
    p.grad = torch.tensor([1e-4, -2e-4, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), -(1 - 1.9 / 3) * torch.tensor([1e-4, -2e-4, 0.0]))


def test_critical_momenta_step_as_published_where_nothing_is_corrected_any_more() -> None:
    """At an age at which 1 - beta1^t is 1; before, published code leaps."""
    start, grads = drive.start_of((3, 4)), drive.gradients((3, 4), 2)
    early = [reference.CriticalAdam(start, 1e-2, 0.0) for _ in range(2)]
    early[1].published = True
    for g in grads:
        moved = [one.step(g) for one in early]
    assert (moved[1] - start).abs().max() > 3 * (moved[0] - start).abs().max()
    late = [reference.CriticalAdam(start, 1e-2, 0.0) for _ in range(2)]
    late[1].published = True
    for one in late:
        one.step(grads[0])
        one.t, one.kept = 1000, []
        one.m, one.v = grads[1].double(), grads[1].double() ** 2
    torch.testing.assert_close(late[0].direction(grads[0].double()), late[1].direction(grads[0].double()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: INNAprop(beta=0.0), "beta > 0"),
        (lambda: ScheduleFree(-1), "warmup is at least 0"),
        (lambda: MARS.of("fp32", gamma=-1.0), "gamma is at least 0"),
        (lambda: FAdam.of("fp32", clip=0.0), "clip is above 0"),
        (lambda: TAM.of("fp32", gamma=1.0), "gamma lies in"),
        (lambda: CriticalAdam.of("fp32", decay=0.0), "decay lies in"),
    ],
)
def test_numbers_outside_their_range(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
