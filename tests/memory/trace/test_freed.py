"""A released gradient is freed when its tensor has stepped, not when the garbage collector comes by."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lowmem.optim.release import release
from lowmem.strategies import available, create, optimizer
from tests.enrolled import by_turns
from tests.memory.families import batch, loss, model

RELEASED = [n for n in sorted(available()) if create(n).source.needs_autograd and not create(n).waits]


@pytest.mark.parametrize("name", by_turns(RELEASED))
def test_no_gradient_outlives_its_step(name):
    made, inputs = model("llama"), batch()
    stepper = optimizer(made, name)
    awake = [n for n, p in stepper.named_parameters() if not stepper.resting(p)]  # a tensor at rest has none
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    stepped: list[str] = []
    most = 0
    inner = stepper.step_param

    def step_param(p, g):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        stepped.append(stepper.place(p).name)
        alive.append(weakref.ref(p.grad.untyped_storage()))
        inner(p, g)

    stepper.step_param = step_param
    handle = release(stepper)
    gc.collect()
    gc.disable()
    try:
        loss(made, inputs).backward()
        left = sum(ref() is not None for ref in alive)
    finally:
        gc.enable()
        handle.remove()
    assert awake
    assert sorted(stepped) == sorted(awake)
    if not stepper.strategy.turns:
        assert len(awake) == len(list(made.parameters()))
    # the one before may still be on autograd's stack
    assert most <= 1
    assert left == 0
