"""Element-wise rules against answers worked out in double precision, and against torch where it has them.

Three gradients of a vector of two, learning rate 0.1, no decay. The answers are the papers' equations
evaluated in double precision, and agree with the published code of each method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.optim.elementwise import Elementwise, coded
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.rules.elementwise.adam_kin import AdaBelief, AMSGrad, LaProp, NAdam
from lowmem.optim.rules.elementwise.long_memory import Adan, AdEMAMix, DiffGrad
from lowmem.optim.rules.elementwise.sign import Ano, Lion
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop

GRADIENTS = [[1.0, -2.0], [0.5, 0.25], [-1.5, 3.0]]
Betas = tuple[float, float]

ANSWERS: list[tuple[Elementwise, Betas, float, list[list[float]]]] = [
    (Lion(), (0.9, 0.99), 1e-8, [[0.9, -0.9], [0.8, -1.0], [0.9, -1.1]]),
    (
        Ano(), (0.92, 0.99), 1e-8,
        [[0.900000001, -0.9000000005], [0.8366588874, -0.8824159664], [0.9752824249, -1.025909188]],
    ),
    (
        Adan(0.92), (0.98, 0.99), 1e-8,
        [[0.900000001, -0.9000000005], [0.828050275, -0.9098992346], [0.8693546808, -0.9659695166]],
    ),
    (
        AdEMAMix(), (0.9, 0.999), 1e-8,
        [[0.899980001, -0.8999800005], [0.8067240878, -0.8427019826], [0.8149217721, -0.8710911973]],
    ),
    (
        AdEMAMix(warmup=10), (0.9, 0.999), 1e-8,
        [[0.8999801812, -0.8999801807], [0.806699496, -0.8426746066], [0.8148560613, -0.871027164]],
    ),
    (
        DiffGrad(), (0.9, 0.999), 1e-8,
        [[0.9268941653, -0.9119203061], [0.8688697902, -0.8601259432], [0.8760902814, -0.8867980807]],
    ),
    (
        AdaBelief(), (0.9, 0.999), 1e-8,
        [[0.888889576, -0.888889061], [0.7813689029, -0.8263439127], [0.7900536027, -0.8566307255]],
    ),
    (
        AdaBelief(rectify=True), (0.9, 0.999), 1e-16,
        [[0.9, -0.8], [0.8263157895, -0.7184210526], [0.835171878, -0.7776461449]],
    ),
    (
        LaProp(), (0.9, 0.999), 1e-15,
        [[0.9, -0.9], [0.819339449, -0.8618660076], [0.8196784376, -0.8908451555]],
    ),
    (
        AMSGrad(), (0.9, 0.5), 1e-8,
        [[0.900000001, -0.9000000005], [0.8097556432, -0.8500433021], [0.8169866091, -0.8747803142]],
    ),
    (
        NAdam(), (0.9, 0.999), 1e-8,
        [[0.8943548232, -0.8943548227], [0.8419624938, -0.9010642466], [0.9270034019, -0.9916340631]],
    ),
]  # fmt: skip


def stepping(rule: Elementwise, betas: Betas, eps: float, start: Any, **hyper: Any) -> tuple[Any, Any]:
    weight = nn.Parameter(torch.tensor(start))
    strategy = Strategy(rules={"matrix": coded(rule), "other": coded(rule)}, source=Backprop())
    return weight, LowMemOptimizer([weight], strategy, betas=betas, eps=eps, **{"lr": 0.1, **hyper})


@pytest.mark.parametrize(("rule", "betas", "eps", "answers"), ANSWERS, ids=lambda x: str(x)[:24])
def test_known_answers(rule: Elementwise, betas: Betas, eps: float, answers: list[list[float]]) -> None:
    weight, optimizer = stepping(rule, betas, eps, [1.0, -1.0])
    for g, answer in zip(GRADIENTS, answers, strict=True):
        weight.grad = torch.tensor(g)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(answer), rtol=0, atol=3e-7)


PEERS: list[tuple[Elementwise, Callable[..., torch.optim.Optimizer]]] = [
    (AMSGrad(), lambda p, **k: torch.optim.AdamW(p, amsgrad=True, **k)),
    (NAdam(), lambda p, **k: torch.optim.NAdam(p, decoupled_weight_decay=True, **k)),
]


@pytest.mark.parametrize(("rule", "peer"), PEERS, ids=lambda x: type(x).__name__)
def test_forty_steps_equal_those_of_torch(rule: Elementwise, peer: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    weight, ours = stepping(rule, (0.9, 0.99), 1e-8, start.tolist(), lr=1e-2, weight_decay=0.1)
    other = nn.Parameter(start.clone())
    theirs = peer([other], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for _ in range(40):
        weight.grad = torch.randn(7, 5, generator=generator)
        other.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", [answer[0] for answer in ANSWERS], ids=lambda x: str(x)[:24])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8", "int4", "companded8"])
def test_rest_and_huge_gradients_leave_finite_weights(rule: Elementwise, states: str) -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    strategy = Strategy(rules={"matrix": coded(rule, states), "other": coded(rule)}, source=Backprop())
    optimizer = LowMemOptimizer([weight], strategy, lr=1e-3)
    for size in (0.0, 1e-5, 1e20, 0.0, 1e-20):
        weight.grad = torch.full_like(weight, size)
        weight.grad[::2] = 0.0
        optimizer.step()
        assert weight.isfinite().all(), size


def test_a_gradient_that_stays_zero_moves_nothing() -> None:
    for rule, betas, eps, _ in ANSWERS:
        weight, optimizer = stepping(rule, betas, eps, [1.0, -1.0])
        for _ in range(3):
            weight.grad = torch.zeros(2)
            optimizer.step()
        assert weight.tolist() == [1.0, -1.0], type(rule).__name__


def test_ano_has_eps_outside_its_root() -> None:
    """Published PyTorch code has it inside: visible where gradients are small."""
    weight, optimizer = stepping(Ano(), (0.92, 0.99), 1e-2, [1.0, -1.0])
    weight.grad = torch.tensor([1e-3, 1e-3])
    optimizer.step()
    expected = 1.0 - 0.1 * 1e-3 / (1e-3 + 1e-2)
    assert float(weight.detach()[0]) == pytest.approx(expected, rel=1e-6)
    assert float(weight.detach()[0]) != pytest.approx(1.0 - 0.1 * 1e-3 / (1e-6 + 1e-2) ** 0.5, rel=1e-4)
