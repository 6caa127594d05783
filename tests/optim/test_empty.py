"""Tensors without elements are planned and stepped like all others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowmem
from lowmem.memory.count import state_bytes
from tests.sources.tiny import Vector


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_tensor_is_planned_as_it_is_held(shape: tuple[int, int]) -> None:
    drift = lowmem.create("lotus", rank=2)
    held = drift.rules["matrix"].init(torch.zeros(shape))
    assert state_bytes(drift, shape) == sum(x.nbytes for x in held.values())


def test_nothing_is_carried_along_for_an_empty_parameter() -> None:
    model = Vector(3)
    model.empty = nn.Parameter(torch.zeros(0))
    optimizer = lowmem.optimizer(model, "zo_adamu", lr=0.1)
    for _ in range(2):
        optimizer.step(lambda: model().sum() + model.empty.sum())
