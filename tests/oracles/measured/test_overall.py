"""Rules that are told more than gradients: their papers over several tensors, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem
from lowmem.errors import UserError
from lowmem.optim.release import release
from lowmem.optim.tensors.told import drawn
from tests.oracles.drive import gradients, on_weights, start_of, step

SHAPES = {"a": (4, 7), "b": (9, 3), "c": (5,)}
START = {name: start_of(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
STEPS = 5


def streams(seed: int = 3) -> list[dict[str, Tensor]]:
    found = {name: gradients(shape, STEPS, seed + i) for i, (name, shape) in enumerate(SHAPES.items())}
    return [{name: found[name][t] for name in SHAPES} for t in range(STEPS)]


def flat(of: dict[str, Tensor]) -> Tensor:
    return torch.cat([of[name].detach().double().view(-1) for name in SHAPES])


class DoG:
    """All tensors as one vector."""

    def __init__(self, w: Tensor, reps_rel: float, decay: float) -> None:
        self.w = self.w0 = w
        self.r, self.s, self.decay = reps_rel * (1 + float(w.norm())), 0.0, decay

    def step(self, g: Tensor, loss: float) -> Tensor:
        h = g + self.decay * self.w
        self.r, self.s = max(self.r, float((self.w - self.w0).norm())), self.s + float(h.square().sum())
        self.w = self.w - self.r / self.s**0.5 * h
        return self.w


class MoMo:
    """All tensors as one vector; the published order of operations."""

    def __init__(self, w: Tensor, lr: float, decay: float, adaptive: bool) -> None:
        self.w, self.lr, self.decay, self.adaptive, self.t = w, lr, decay, adaptive, 0
        self.m, self.v, self.f, self.p = torch.zeros_like(w), torch.zeros_like(w), 0.0, 0.0

    def step(self, g: Tensor, loss: float) -> Tensor:
        self.t += 1
        beta1, beta2, size = 0.9, 0.999, 1 + self.lr * self.decay
        if self.t == 1 and not self.adaptive:
            self.m, self.f, self.p = g.clone(), loss, float(g @ self.w)
        self.f = beta1 * self.f + (1 - beta1) * loss
        self.m = beta1 * self.m + (1 - beta1) * g
        self.p = beta1 * self.p + (1 - beta1) * float(g @ self.w)
        self.v = beta2 * self.v + (1 - beta2) * g * g
        root = (self.v / (1 - beta2**self.t)).sqrt() + 1e-8 if self.adaptive else torch.ones_like(g)
        bias = 1 - beta1**self.t if self.adaptive else 1.0
        above = size * self.f + float(self.m @ self.w) - size * self.p
        tau = min(self.lr / bias, max(above, 0.0) / float((self.m * self.m / root).sum()))
        self.w = (self.w - tau * self.m / root) / size
        return self.w


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "dog": ("dog", {"reps_rel": 1e-2}, {"lr": 1.0}, lambda w: DoG(w, 1e-2, 0.1)),
    "momo": ("momo", {}, {"lr": 0.5}, lambda w: MoMo(w, 0.5, 0.1, False)),
    "momo, at its cap": ("momo", {}, {"lr": 1e-3}, lambda w: MoMo(w, 1e-3, 0.1, False)),
    "momo_adam": ("momo_adam", {}, {"lr": 0.5}, lambda w: MoMo(w, 0.5, 0.1, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_one_vector(case: str) -> None:
    """Also after a resume on the way."""
    name, options, hyper, truth_of = CASES[case]
    told = {**hyper, "weight_decay": 0.1}
    truth, (one, params) = truth_of(flat(START)), on_weights(name, START, hyper=told, **options)
    for t, grads in enumerate(streams()):
        loss = 0.3 + 0.05 * t
        if t == 3:
            saved = one.state_dict()
            one, params = on_weights(name, params, hyper=told, **options)
            one.load_state_dict(saved)
        one.add_loss(torch.tensor(loss, dtype=torch.float64))
        step(one, params, grads)
        expected = truth.step(flat(grads), loss)
        torch.testing.assert_close(flat(params), expected, rtol=0, atol=2e-6)


def test_a_tensor_that_missed_steps_counts_on_from_where_the_model_is() -> None:
    """Its gradients were none: the sum over the model goes on without it."""
    one, params = on_weights("dog", START, hyper={"lr": 1.0}, reps_rel=1e-2)
    for t, grads in enumerate(streams()):
        for name, p in params.items():
            p.grad = None if name == "b" and t in (0, 2) else grads[name].clone()
        one.step()
    squares = {float(one.state[p]["squares"]) for p in params.values()}
    expected = sum(
        float(g.double().square().sum())
        for t, grads in enumerate(streams())
        for name, g in grads.items()
        if not (name == "b" and t in (0, 2))
    )
    (held,) = squares
    assert held == pytest.approx(expected)


@pytest.mark.parametrize("name", ["dog", "momo"])
def test_a_tensor_that_is_not_finite_stands_still_and_says_nothing(name: str) -> None:
    one, params = on_weights(name, START, hyper={"lr": 0.1})
    one.add_loss(torch.tensor(2.0))
    grads = streams()[0]
    grads["b"][0, 0] = torch.inf
    step(one, params, grads)
    assert torch.equal(params["b"], START["b"])
    for other in ("a", "c"):
        assert params[other].isfinite().all()
        assert not torch.equal(params[other], START[other])


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    one, params = on_weights("momo_adam", START, hyper={"lr": 0.1})
    one.add_loss(torch.tensor(torch.nan))
    step(one, params, streams()[0])
    assert all(torch.equal(p, START[name]) for name, p in params.items())


def test_losses_come_by_closure_by_backward_and_by_word() -> None:
    """The losses of micro-batches are summed, as their gradients are."""
    ends = []
    for way in ("closure", "backward", "word"):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.copy_(torch.arange(6.0).view(2, 3) / 6)
        one = lowmem.optimizer([model.weight], "momo", lr=10.0)
        x = torch.ones(4, 3)

        def loss_of(model: nn.Linear = model, x: Tensor = x) -> Tensor:
            return (x @ model.weight.t()).square().mean() / 2

        def closure(loss_of: Any = loss_of) -> Tensor:
            total = loss_of() + loss_of()
            total.backward()
            return total

        if way == "closure":
            one.step(closure)
        else:
            for _ in range(2):
                if way == "backward":
                    one.backward(loss_of)
                else:
                    loss = loss_of()
                    loss.backward()
                    one.add_loss(loss)
            one.step()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


SOPHIA = {
    1: [[0.9, -0.9], [0.8, -0.8], [0.9, -0.9]],
    32: [[0.9, -0.9], [0.8, -0.8], [0.8067836497, -0.8290407979]],
}


@pytest.mark.parametrize("count", SOPHIA)
def test_known_answers_of_sophia(count: int) -> None:
    """A probe at each step that finds the gradient itself, as the published code prints them."""
    hyper = {"lr": 0.1, "betas": (0.965, 0.99)}
    one, params = on_weights("sophia", {"w": torch.tensor([1.0, -1.0])}, role="vector", hyper=hyper, every=1)
    p = params["w"]
    for g, answer in zip([[1.0, -2.0], [0.5, 0.25], [-1.5, 3.0]], SOPHIA[count], strict=True):
        p.grad = torch.tensor(g)
        with one._at_work():
            one._sense(p, torch.tensor(float(count), dtype=torch.float64))
        one._probed = one.param_groups[0]["step"]
        one.step()
        torch.testing.assert_close(p.detach(), torch.tensor(answer), rtol=0, atol=1e-6)


def classifier(seed: int = 0) -> tuple[nn.Linear, Tensor]:
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 6, generator=g))
    return model, torch.randn(4000, 6, generator=g)


def test_probes_find_the_gauss_newton_diagonal() -> None:
    """B P^2 has it for its mean: here over a hundred probes of 40 places each."""
    model, x = classifier()
    one = lowmem.optimizer(model, "sophia", lr=0.0, betas=(0.9, 0.0), every=1)
    chance = (x @ model.weight.detach().t()).softmax(-1)
    exact = (chance * (1 - chance)).t() @ x.square() / len(x)
    found = torch.zeros_like(exact)
    for part in x.view(100, 40, 6):
        one.probe(model(part))
        one.step()
        found += one.state[model.weight]["hessian"] / 100
    assert float((found - exact).norm() / exact.norm()) < 0.15


def test_labels_are_drawn_by_name_and_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    labels = drawn(logits, (0, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(labels, drawn(logits, (0, 5)))
    assert not torch.equal(labels, drawn(logits, (0, 6)))
    shares = torch.bincount(labels, minlength=3) / len(labels)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.01)


def test_a_probe_leaves_gradients_as_they_are_and_works_in_a_subspace() -> None:
    model, x = classifier()
    for options in ({}, {"projector": "power", "rank": 2, "on_refresh": "rotate"}, {"states": "int8"}):
        one = lowmem.optimizer(model, "sophia", lr=1e-3, every=2, **options)
        for t in range(4):
            loss = F.cross_entropy(model(x[:64]), x[:64].argmax(-1) % 4)
            loss.backward()
            before = model.weight.grad.clone()
            assert one.probe_due == (t % 2 == 0)
            if one.probe_due:
                one.probe(model(x[64:128]), torch.arange(64) % 3 > 0)
            assert torch.equal(model.weight.grad, before)
            one.step()
            one.zero_grad()
        assert not one.probe_due or one.param_groups[0]["step"] % 2 == 0


def test_what_is_not_told_is_refused_with_the_remedy() -> None:
    model, x = classifier()
    model(x[:8]).sum().backward()
    for name, words in (("momo", "add_loss"), ("sophia", "probe_due")):
        one = lowmem.optimizer(model, name, lr=1e-3)
        with pytest.raises(UserError, match=words):
            one.step()
        with pytest.raises(UserError, match="LowMemTrainer"):
            lowmem.hf_optimizer(name, lr=1e-3)
    for name in ("dog", "momo", "sophia"):
        with pytest.raises(UserError, match="gradient release"):
            release(lowmem.optimizer(model, name, lr=1e-3))
    with pytest.raises(UserError, match="call step"):
        lowmem.optimizer(model, "dog", lr=1.0).step_param(model.weight, model.weight.grad)
    with pytest.raises(UserError, match="no probe"):
        lowmem.optimizer(model, "adamw", lr=1e-3).probe(model(x[:8]))
    with pytest.raises(UserError, match="modifiers"):
        lowmem.create("dog", modifiers="limit")
    with pytest.raises(UserError, match="source=backprop"):
        lowmem.create("sophia", source="spsa")
    with pytest.raises(UserError, match="subspace"):
        lowmem.create("momo", projector="power")
