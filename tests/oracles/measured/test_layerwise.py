"""SGD-SaI and NovoGrad: their papers in double precision, known answers, and their invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.contract import AnyRule
from lowmem.optim.rules.measured.layerwise import NovoGrad, SGDSaI
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from tests.oracles import drive
from tests.oracles.normalised.reference_normalised import Reference
from tests.oracles.normalised.test_normalised import optimizer_of, stepped

EPS = 1e-8
RULES: dict[str, AnyRule] = {
    "sgd_sai": SGDSaI.of("fp32"),
    "novograd": NovoGrad.of("fp32"),
    "novograd_averaging": NovoGrad.of("fp32", averaging=True),
}


class PaperSGDSaI(Reference):
    """arXiv 2412.11768."""

    def direction(self, g: Tensor) -> Tensor:
        if self.t == 1:
            self.k, self.m = g.norm() / (g.std() + EPS), g
        else:
            self.m = 0.9 * self.m + 0.1 * g
        return self.k * self.m


class PaperNovoGrad(Reference):
    """arXiv 1905.11286, the decay decoupled."""

    averaging = False

    def direction(self, g: Tensor) -> Tensor:
        beta1, beta2 = 0.95, 0.98
        square = g.norm() ** 2
        self.v = square if self.t == 1 else beta2 * self.v + (1 - beta2) * square
        u = g / (self.v.sqrt() + EPS) * (1 - beta1 if self.averaging else 1)
        self.m = (beta1 * self.m if self.t > 1 else 0) + u
        return self.m


class PaperAveraging(PaperNovoGrad):
    averaging = True


PAPERS = {"sgd_sai": PaperSGDSaI, "novograd": PaperNovoGrad, "novograd_averaging": PaperAveraging}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(37, 53), (19,), (1100, 1000)])
def test_the_paper_in_double_precision(name: str, shape: tuple[int, ...]) -> None:
    start, grads = drive.start_of(shape), [g + 0.3 for g in drive.gradients(shape, 4)]
    truth = PAPERS[name](start, 1e-3, 0.1)
    got = stepped(RULES[name], start, grads, lr=1e-3, weight_decay=0.1, betas=(0.95, 0.98), eps=EPS)
    for g in grads:
        expected = truth.step(g)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-6)


NOVOGRAD = {
    "novograd": [[0.9552786407, -0.9105572813], [0.8902200435, -0.8368733514], [0.8952753039, -0.9005954737]],
    "novograd_averaging": [
        [0.997763932, -0.9955278641], [0.9945110022, -0.9918436676], [0.9947637652, -0.9950297737],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NOVOGRAD)
def test_known_answers(name: str) -> None:
    """Three gradients of a vector of two; the answers agree with published code."""
    optimizer, p = optimizer_of(RULES[name], torch.tensor([1.0, -1.0]), lr=0.1, betas=(0.95, 0.98), eps=EPS)
    for g, answer in zip([[1.0, -2.0], [0.5, 0.25], [-1.5, 3.0]], NOVOGRAD[name], strict=True):
        p.grad = torch.tensor(g)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(answer), rtol=0, atol=3e-7)


def test_the_scale_of_a_gradient_without_mean_is_the_root_of_its_size() -> None:
    g = torch.ones(10, 10)
    g[::2] = -1.0
    optimizer, p = optimizer_of(RULES["sgd_sai"], torch.zeros(10, 10), lr=0.1, eps=0.0)
    p.grad = g
    optimizer.step()
    assert float(optimizer.state[p]["scale"]) == pytest.approx(99**0.5)


@pytest.mark.parametrize("factor", [1e-18, 1e18])
def test_the_scale_does_not_know_the_size_of_the_gradient(factor: float) -> None:
    g, scales = drive.gradients((6, 9), 1)[0], []
    for size in (1.0, factor):
        optimizer, p = optimizer_of(RULES["sgd_sai"], torch.zeros(6, 9), lr=0.1, eps=0.0)
        p.grad = g * size
        optimizer.step()
        scales.append(float(optimizer.state[p]["scale"]))
    assert scales[1] == pytest.approx(scales[0], rel=1e-4)


@pytest.mark.parametrize("start", [torch.ones(1), torch.ones(4, 4)])
def test_equal_elements_take_ordinary_steps(start: Tensor) -> None:
    """The paper divides by eps, 1e8 times too far."""
    moved = stepped(RULES["sgd_sai"], start, [torch.full_like(start, 0.5)], lr=0.1)
    torch.testing.assert_close(moved, start - 0.1 * 0.5 * start.numel() ** 0.5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_a_resume_is_exact(name: str, states: str) -> None:
    rule = SGDSaI.of(states) if name == "sgd_sai" else NovoGrad.of(states, averaging=name != "novograd")
    start, grads = drive.start_of((20, 30)), drive.gradients((20, 30), 4)
    one, p = optimizer_of(rule, start, lr=0.01)
    for g in grads[:2]:
        p.grad = g.clone()
        one.step()
    other, q = optimizer_of(rule, p.detach(), lr=0.01)
    other.load_state_dict(one.state_dict())
    for g in grads[2:]:
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        other.step()
    assert torch.equal(p, q)
    assert float(one.state[p][type(rule).number]) > 0.0


@pytest.mark.parametrize("name", RULES)
def test_the_number_waits_for_a_gradient(name: str) -> None:
    """Neither zeros nor what is not finite decide: what follows is as if they had not been."""
    start, g = drive.start_of((6, 9)), drive.gradients((6, 9), 1)[0]
    bad = g.clone()
    bad[1, 1] = torch.nan
    late = stepped(RULES[name], start, [torch.zeros(6, 9), bad, g], lr=0.01)
    torch.testing.assert_close(late, stepped(RULES[name], start, [g], lr=0.01), rtol=0, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_what_is_held(name: str) -> None:
    optimizer, p = optimizer_of(RULES[name], torch.zeros(20, 30), lr=0.1)
    p.grad = torch.ones(20, 30)
    optimizer.step()
    strategy = Strategy(rules={"matrix": RULES[name], "other": RULES[name]}, source=Backprop())
    held = sum(x.nbytes for x in optimizer.state[p].values())
    assert held == lowmem.state_bytes(strategy, (20, 30)) == 4 * 600 + 4


def test_a_momentum_outside_its_range() -> None:
    with pytest.raises(UserError, match="momentum must be in"):
        SGDSaI.of("fp32", momentum=1.0)
