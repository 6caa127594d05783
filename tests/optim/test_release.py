"""What release refuses rather than take a step of a part of a gradient, and what a loaded state tells it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.release import Release, release
from lowmem.training.factory import hf_optimizer

LR = 0.01


def net() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 5)


def made(model: nn.Module, clip: str = "none") -> tuple[lowmem.LowMemOptimizer, Release]:
    optimizer = lowmem.optimizer(model, "adamw", lr=LR)
    return optimizer, release(optimizer, clip=clip, max_norm=0.01 if clip != "none" else 0.0)


def backward(model: nn.Module, step: int) -> None:
    model(torch.full((2, 6), 1.0 + step)).square().sum().backward()


def test_a_second_gradient_before_step_is_refused() -> None:
    model = net()
    optimizer, handle = made(model)
    backward(model, 0)
    with pytest.raises(
        UserError, match=r"gradient release: '(weight|bias)' was stepped .*sync.*use_reentrant"
    ):
        backward(model, 1)
    optimizer.step()
    backward(model, 2)  # of the next step
    handle.remove()
    backward(model, 3)
    backward(model, 4)  # an ordinary optimizer's gradients are summed


def test_a_state_that_is_loaded_after_release_tells_the_norm_before() -> None:
    model = net()
    optimizer, _ = made(model, "previous")
    for step in range(2):
        backward(model, step)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    others = [net(), copy.deepcopy(model)]
    for other in others:
        again, _ = made(other, "previous")
        backward(other, 9)  # of which nothing may stay
        again.step()
        other.load_state_dict(weights)
        again.load_state_dict(saved)
        backward(other, 2)
        again.step()
    backward(model, 2)
    optimizer.step()
    for other in others:
        assert torch.equal(other.weight, model.weight)


def test_turns_of_copies_on_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    for name in ("badam", "misa"):
        factory, kwargs = hf_optimizer(name, lr=LR)
        with pytest.raises(UserError, match=rf"{name}: runs on one device for now, found 2"):
            factory()(nn.Sequential(net()), **kwargs)
    factory, kwargs = hf_optimizer("adamw", lr=LR)
    assert factory()(net(), **kwargs)
