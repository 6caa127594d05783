"""MeZO: two forward passes estimate the gradient, and 16-bit weights keep their bits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.oracles import drive
from tests.oracles.zeroth import reference_mezo

NOISE = ["gaussian", "rademacher"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("mezo")


class Holder(nn.Module):
    """One module that owns one weight, so that a probe can be hooked to it."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w.clone())

    def forward(self) -> Tensor:
        return self.weight.clone()  # what the probe put there, not the parameter that gets its value back


class Model(nn.Module):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Holder(w) for w in tensors)

    def forward(self) -> list[Tensor]:
        return [part() for part in self.parts]


def optimizer_of(
    model: nn.Module, lr: float, weight_decay: float = 0.0, seed: int = 0, **options: Any
) -> Any:
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    hyper = {"lr": lr, "weight_decay": weight_decay, "decay_names": matrices, "seed": seed}
    return drive.lowmem.optimizer(model, "mezo", **hyper, **options)


def estimates(problem: Any, w: Tensor, steps: int, **options: Any) -> Tensor:
    """c z of many steps at the same point: the weight is put back after each."""
    model, lr = Model(w), 0.5
    optimizer = optimizer_of(model, lr, **options)
    out = []
    for _ in range(steps):
        optimizer.backward(lambda: problem(model()[0]), model)
        optimizer.step()
        p = model.parts[0].weight
        out.append((w.double() - p.detach().double()) / lr)
        with torch.no_grad():
            p.copy_(w)
    return torch.stack(out)


@pytest.mark.parametrize("noise", NOISE)
def test_the_expectation_is_the_gradient(noise: str) -> None:
    size, draws = 20, 400
    problem, w = reference_mezo.quadratic(size), torch.zeros(size)
    sample = estimates(problem, w, draws, noise=noise)
    g = problem.gradient(w)
    error = (sample.mean(0) - g) / reference_mezo.standard_error(sample)
    assert error.abs().max() < 4.5
    assert float(error.square().mean()) < 2.0
    energy = float(sample.square().sum(1).mean() / g.square().sum())
    assert energy == pytest.approx(size + 2 if noise == "gaussian" else size, rel=0.15)


@pytest.mark.parametrize("noise", NOISE)
def test_every_estimate_is_the_slope_along_its_own_noise(noise: str) -> None:
    """On a linear loss c = z'g whatever epsilon, so the step is (z'g) z for some z."""
    b = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample = estimates(lambda w: b @ w.reshape(-1).double(), torch.zeros(16), 20, noise=noise)
    along = sample @ b
    assert (along >= 0).all()  # (z'g)^2
    z = sample / along.sqrt().unsqueeze(1)  # up to its sign
    torch.testing.assert_close((z @ b).square(), along, rtol=1e-4, atol=1e-6)
    if noise == "rademacher":
        torch.testing.assert_close(z.abs(), torch.ones_like(z), rtol=1e-3, atol=0.0)


def test_noise_is_standard_normal_and_new_in_every_step() -> None:
    b = torch.zeros(4096, dtype=torch.float64)
    b[0] = 1.0
    sample = estimates(lambda w: b @ w.reshape(-1).double(), torch.zeros(4096), 12, noise="gaussian")
    z = sample[:, 1:] / sample[:, :1].sqrt()
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.05)
    correlation = torch.corrcoef(z)
    assert correlation.fill_diagonal_(0.0).abs().max() < 5 / 4096**0.5


def big_model(dtype: torch.dtype, size: int = 1 << 20) -> Model:
    w = 0.02 * torch.randn(1024, size // 1024, generator=torch.Generator().manual_seed(0))
    return Model(w.to(dtype))


@pytest.mark.parametrize("noise", NOISE)
def test_a_tiny_step_is_realised_in_bf16(noise: str) -> None:
    """lr c = 5e-7 for each unit of noise, weights of standard deviation 0.02, a million elements: 3 %."""
    model, reference = big_model(torch.bfloat16), big_model(torch.float32)
    before = model.parts[0].weight.detach().clone()
    with torch.no_grad():
        reference.parts[0].weight.copy_(before)
    moved, slopes = [], []
    for which, size in ((reference, 1.0), (model, 5e-7)):
        losses: list[Tensor] = []

        def loss(net: Model = which, losses: list[Tensor] = losses) -> Tensor:
            losses.append(net()[0].double().mean() * 1e4)
            return losses[-1]

        optimizer = optimizer_of(which, 0.0, noise=noise)
        optimizer.backward(loss, which)
        slopes.append(float(losses[0] - losses[1]) / 2e-3)  # each its own: bf16 probes are rounded
        optimizer.param_groups[0]["lr"] = size / abs(slopes[-1])
        optimizer.step()
        moved.append((before.double() - which.parts[0].weight.detach().double()).flatten())
    step, intended = moved[1], 5e-7 * moved[0] * (1 if slopes[0] * slopes[1] > 0 else -1)
    gain = float(step @ intended / (intended @ intended))
    assert 0.97 <= gain <= 1.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probing_leaves_the_weights_bit_for_bit(dtype: torch.dtype) -> None:
    model = Model(torch.randn(64, 33).to(dtype), torch.ones(17).to(dtype))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model, 1e-3)
    losses: list[float] = []

    def loss() -> Tensor:
        value = sum(w.float().square().sum() for w in model())
        losses.append(float(value.detach()))
        return value

    optimizer.backward(loss, model)
    if dtype != torch.float32:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-7)
    assert len(losses) == 2
    assert losses[0] != losses[1]


def test_an_exception_in_a_probe_restores_the_weights() -> None:
    model = Model(torch.randn(64, 33).bfloat16())
    before = model.parts[0].weight.detach().clone()
    optimizer = optimizer_of(model, 1e-3)

    def loss() -> Tensor:
        model()
        raise RuntimeError("out of patience")

    with pytest.raises(RuntimeError, match="out of patience"):
        optimizer.backward(loss, model)
    assert torch.equal(model.parts[0].weight, before)
    assert torch.equal(model()[0], before)


def test_no_global_generator_is_touched() -> None:
    model = Model(torch.randn(8, 8))
    optimizer = optimizer_of(model, 1e-3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer.backward(lambda: model()[0].square().sum(), model)
    optimizer.step()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_dropout_is_off_in_the_probes_and_the_mode_comes_back() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.drop = nn.Dropout(0.5)
            self.modes: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append(self.training)
            return self.drop(self.layer(x)).square().mean()

    model = Dropping().train()
    optimizer = optimizer_of(model, 1e-3)
    optimizer.backward(lambda: model(torch.ones(4, 8)), model)
    assert model.modes == [False, False]
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(value: float) -> None:
    model = Model(torch.randn(8, 8))
    before = model.parts[0].weight.detach().clone()
    optimizer = optimizer_of(model, 1e-3)
    optimizer.backward(lambda: model()[0].sum() * value, model)
    optimizer.step()
    torch.testing.assert_close(model.parts[0].weight.detach(), before, rtol=1e-6, atol=1e-7)
    assert torch.isfinite(model.parts[0].weight).all()
    assert optimizer.nonfinite() > 0


def test_lr_zero_moves_nothing_and_decay_reaches_matrices_alone() -> None:
    tensors = torch.randn(9, 6), torch.randn(6)
    model = Model(*tensors)
    optimizer = optimizer_of(model, 0.0)
    optimizer.backward(lambda: sum(w.sum() for w in model()), model)
    optimizer.step()
    for p, w in zip(model.parameters(), tensors, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-7)
    model = Model(*tensors)
    optimizer = optimizer_of(model, 0.1, weight_decay=0.5)
    optimizer.backward(lambda: sum(0.0 * w.sum() for w in model()), model)
    optimizer.step()
    torch.testing.assert_close(model.parts[0].weight.detach(), 0.95 * tensors[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.parts[1].weight.detach(), tensors[1], rtol=1e-6, atol=1e-7)


def test_the_state_is_empty() -> None:
    model = Model(torch.randn(64, 33))
    optimizer = optimizer_of(model, 1e-3)
    optimizer.backward(lambda: model()[0].square().sum(), model)
    optimizer.step()
    assert optimizer.state_bytes() == 0
    assert drive.lowmem.state_bytes(drive.lowmem.create("mezo"), (64, 33)) == 0


def test_a_shared_weight_has_one_noise() -> None:
    """On L = w1'b - w2'b with one weight under two owners the slope is zero."""
    w = torch.randn(8)
    model = Model(w, w)
    model.parts[1].weight = model.parts[0].weight
    optimizer = optimizer_of(model, 1.0)
    optimizer.backward(lambda: (model()[0] - model()[1]).sum(), model)
    optimizer.step()
    torch.testing.assert_close(model.parts[0].weight.detach(), w, rtol=1e-6, atol=1e-6)


def test_a_score_without_a_gradient_can_be_learned() -> None:
    """Minus accuracy of a linear classifier: torch could not differentiate it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=g)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 1.0]) > 0).long()
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.0, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0]]))
        model.bias.zero_()

    def loss() -> Tensor:
        return -(model(x).argmax(1) == y).float().mean()

    before = float(loss())
    optimizer = optimizer_of(model, 0.02, eps_perturb=0.05)
    for _ in range(200):
        optimizer.backward(loss, model)
        optimizer.step()
    assert float(loss()) < before - 0.1
