"""LOMO and AdaLomo: their papers transcribed, and one gradient alive at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.optim.release import release
from tests.oracles import drive

LR, DECAY = 1e-2, 0.1


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 5))


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean() + net(x).mean()


class AdaLomo:
    """One tensor in double precision, arXiv 2310.10195, algorithm 1."""

    def __init__(self, w: Tensor) -> None:
        self.w, self.t = w.detach().double(), 0
        self.r, self.c, self.v = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def step(self, g: Tensor) -> None:
        self.t += 1
        g, rate = g.double(), self.t**-0.8
        square = g.square() + 1e-30
        if g.dim() > 1:
            self.r = self.r + rate * (square.mean(1) - self.r)
            self.c = self.c + rate * (square.mean(0) - self.c)
            v = torch.outer(self.r, self.c) / self.r.mean()
        else:
            self.v = v = self.v + rate * (square - self.v)
        u = g / v.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        alpha = LR * max(1e-3, float(self.w.square().mean().sqrt()))
        self.w = (1 - alpha * DECAY) * self.w - alpha * u


class Lomo:
    """One tensor in double precision, arXiv 2306.09782."""

    def __init__(self, w: Tensor) -> None:
        self.w = w.detach().double()

    def step(self, g: Tensor) -> None:
        self.w = (1 - LR * DECAY) * self.w - LR * g.double()


@pytest.mark.parametrize(("name", "paper"), [("lomo", Lomo), ("ada_lomo", AdaLomo)])
def test_stepping_inside_backward_is_the_paper(name: str, paper: type) -> None:
    """A later tensor is stepped first; the gradients of earlier ones are those of the weights before."""
    net = model()
    optimizer = lowmem.optimizer(net, name, lr=LR, weight_decay=DECAY)
    truth = [paper(p) for p in net.parameters()]
    handle = release(optimizer)
    for step in range(4):
        grads = torch.autograd.grad(loss_of(net, step), list(net.parameters()))
        for one, g in zip(truth, grads, strict=True):
            one.step(g)
        loss_of(net, step).backward()
        optimizer.step()
    handle.remove()
    for one, p in zip(truth, net.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), one.w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lomo", "ada_lomo"])
def test_one_gradient_lives_at_a_time(name: str) -> None:
    net, alive = model(), []
    for p in net.parameters():  # before the release's own hooks
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in net.parameters()))
        )
    release(lowmem.optimizer(net, name, lr=LR))
    loss_of(net, 0).backward()
    assert alive == [1] * 6


def test_what_is_held() -> None:
    lomo, ada = lowmem.create("lomo"), lowmem.create("ada_lomo")
    assert lowmem.state_bytes(lomo, (64, 96)) == 0
    assert lowmem.state_bytes(ada, (64, 96)) == 4 * (64 + 96) + 4
    assert lowmem.state_bytes(ada, (96,), role="other") == 4 * 96 + 4


def test_a_step_of_ada_lomo_scales_with_its_weight() -> None:
    start, grads = drive.start_of((9, 14)), drive.gradients((9, 14), 3)
    one, ten = (drive.follow("ada_lomo", scale * start, grads, hyper={"lr": LR})[-1] for scale in (1.0, 10.0))
    torch.testing.assert_close(ten - 10 * start, 10 * (one - start), rtol=1e-4, atol=1e-6)
