"""Lookahead and XGrad: known answers of published code, and their papers with the copies of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.elementwise import Elementwise, coded
from lowmem.optim.evaluated import evaluated
from lowmem.optim.modifiers.around import Lookahead, XGrad
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.adam_kin import AdaBelief
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.rules.elementwise.sign import Lion
from tests.oracles import drive
from tests.oracles.dense.reference_adamw import AdamW
from tests.oracles.normalised.test_normalised import optimizer_of, stepped

GRADIENTS = [torch.tensor(g) for g in ([1.0, -2.0], [0.5, 0.25], [-1.5, 3.0])]
BETAS = (0.9, 0.999)


@pytest.mark.parametrize(
    ("rule", "steps", "answer"),
    [
        (Lookahead(Adam(), every=2), 2, [0.9033910191, -0.9213732717]),
        (Lookahead(Adam(), every=2), 3, [0.9115886989, -0.9497505042]),
        (XGrad(Adam()), 1, [0.800000002, -0.800000001]),
        (XGrad(Adam(), ahead=2), 2, [0.6203461129, -0.7282396290]),
    ],
)
def test_known_answers(rule: Elementwise, steps: int, answer: list[float]) -> None:
    got = stepped(coded(rule), torch.tensor([1.0, -1.0]), GRADIENTS[:steps], lr=0.1, betas=BETAS)
    torch.testing.assert_close(got, torch.tensor(answer), rtol=0, atol=3e-7)


def slope(w: Tensor) -> Tensor:
    """A gradient that knows where it is taken."""
    return torch.sin(3.0 * w) + w


def follow(rule: Elementwise, start: Tensor, steps: int, **hyper: Any) -> tuple[Any, Tensor]:
    optimizer, p = optimizer_of(coded(rule), start, lr=0.03, betas=BETAS, **hyper)
    for _ in range(steps):
        p.grad = slope(p.detach())
        optimizer.step()
    return optimizer, p


def test_lookahead_with_a_slow_copy() -> None:
    start = drive.start_of((5, 6))
    adam = AdamW(start.double(), 0.03, BETAS, 1e-8)
    w = slow = start.double()
    for t in range(1, 13):
        w = w - 0.03 * adam.direction(slope(w))
        if t % 5 == 0:
            w = slow = slow + 0.8 * (w - slow)
    optimizer, p = follow(Lookahead(Adam(), share=0.8), start, 12)
    torch.testing.assert_close(p.detach().double(), w, rtol=2e-6, atol=2e-6)
    with evaluated(optimizer):
        torch.testing.assert_close(p.detach().double(), slow, rtol=2e-6, atol=2e-6)


def test_xgrad_with_a_displaced_forward_pass() -> None:
    start, ahead = drive.start_of((5, 6)), 3
    adam = AdamW(start.double(), 0.03, BETAS, 1e-8)
    w, d = start.double(), torch.zeros(5, 6, dtype=torch.float64)
    for _ in range(12):
        d = adam.direction(slope(w - ahead * 0.03 * d))
        w = w - 0.03 * d
    optimizer, p = follow(XGrad(Adam(), ahead=ahead), start, 12)
    with evaluated(optimizer):
        torch.testing.assert_close(p.detach().double(), w, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize(
    "around", [lambda rule: Lookahead(rule, share=1.0), lambda rule: Lookahead(rule, every=100)]
)
@pytest.mark.parametrize("rule", [Adam(), Lion(), SGD(), AdaBelief()])
def test_who_never_goes_back_is_the_rule(
    around: Callable[[Elementwise], Elementwise], rule: Elementwise
) -> None:
    """Rules with an age and without; to the last bit."""
    start, grads = drive.start_of((5, 6)), drive.gradients((5, 6), 7)
    hyper = {"lr": 0.01, "weight_decay": 0.1}
    assert torch.equal(
        stepped(coded(around(rule)), start, grads, **hyper), stepped(coded(rule), start, grads, **hyper)
    )


def test_sgd_that_looks_back_at_every_step_is_slower_sgd() -> None:
    start, grads = drive.start_of((5, 6)), drive.gradients((5, 6), 4)
    ours = stepped(coded(Lookahead(SGD(), every=1, share=0.25)), start, grads, lr=0.1)
    torch.testing.assert_close(ours, stepped(coded(SGD()), start, grads, lr=0.025))


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_what_is_evaluated_is_where_the_last_look_back_was(name: str) -> None:
    """In a subspace too, whose steps are lifted and scaled; of stacks of matrices and other layouts."""
    model = torch.nn.ParameterDict(
        {"a": torch.randn(3, 6, 8), "b": torch.randn(9, 7).t(), "c": torch.randn(5)}
    )
    optimizer = lowmem.optimizer(
        model, name, modifiers="lookahead", lr=0.1, **({"rank": 3} if name == "galore" else {})
    )
    start = {}
    for t in range(8):
        if t == 5:
            start = {key: p.detach().clone() for key, p in model.items()}
        for p in model.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    now = {key: p.detach().clone() for key, p in model.items()}
    with evaluated(optimizer):
        for key, p in model.items():
            torch.testing.assert_close(p.detach(), start[key], rtol=0, atol=3e-6)
            assert not torch.equal(p, now[key])
    assert all(torch.equal(p, now[key]) for key, p in model.items())


def test_steps_in_units_of_the_gradient_stay_so() -> None:
    assert coded(Lookahead(XGrad(SGD()))).linear
    assert not coded(Lookahead(Adam())).linear


def test_they_take_codecs_subspaces_and_each_other() -> None:
    made = lowmem.create("galore", rank=4, states="int8", modifiers="cautious+lookahead+xgrad")
    assert lowmem.create("galore", **made.options) == made
    assert sorted(made.init("matrix", torch.zeros(8, 8))) == [
        "inner.age", "inner.exp_avg.codes", "inner.exp_avg.scale", "inner.exp_avg_sq.codes",
        "inner.exp_avg_sq.scale", "inner.modified.sums", "inner.previous_step", "inner.since.codes",
        "inner.since.scale", "projector.basis",
    ]  # fmt: skip
    assert lowmem.create("sgd", modifiers="lookahead", states="int8").options["states"] == "int8"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"rule": "adafactor", "modifiers": "lookahead"},
            "lookahead goes around .*take rule=adam, or leave it out",
        ),
        ({"rule": "adabelief", "modifiers": "xgrad", "on_refresh": "rotate"}, "take 'keep' or 'reset'"),
        ({"modifiers": "lookahead", "every": 0}, "every"),
        ({"modifiers": "xgrad", "ahead": 0}, "ahead"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lowmem.create("galore", **options)
