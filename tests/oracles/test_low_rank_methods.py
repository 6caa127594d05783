"""Methods by name are the parts that the other oracles look at; and APOLLO-Mini against its paper."""

from __future__ import annotations

import pytest
import torch

import lowmem
from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.dense import Orthonormal
from lowmem.optim.projectors.grassmann import Track, Walk
from lowmem.optim.projectors.lazy import Lazy
from lowmem.optim.projectors.random import Drawn, Switch
from lowmem.optim.residuals.rest import ScaledRest
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.subspace import Subspace
from tests.oracles.low_rank import reference_subspaces as reference
from tests.oracles.low_rank.test_subspaces import BETAS, EPS, LR, normal, optimizer_of, steps

FRAME, ADAM, REST = Frame(128), coded(Adam()), ScaledRest()
NAMED: dict[str, AnyRule] = {
    "golore": Subspace(Orthonormal(FRAME, Switch(1000)), ADAM, on_refresh="rotate", scale=0.25),
    "grass_walk": Subspace(Orthonormal(FRAME, Walk()), ADAM, REST, "rotate", 0.25),
    "grass_jump": Subspace(Drawn(FRAME), ADAM, REST, "rotate", 0.25),
    "subtrack": Subspace(Orthonormal(FRAME, Track()), ADAM, REST, "rotate", 0.25),
    "q_galore": Subspace(Lazy(FRAME), coded(Adam(), "int8"), scale=0.25),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_method_is_its_parts(name: str) -> None:
    assert lowmem.create(name).rules["matrix"] == NAMED[name]


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_apollo_mini(shape: tuple[int, int]) -> None:
    """One ratio of norms for the whole gradient, times the root of 128, and limited growth."""
    rule = lowmem.create("apollo_mini").rules["matrix"]
    assert isinstance(rule, Subspace)
    start = normal(*shape)
    optimizer, p = optimizer_of(rule, start)
    adam, w = reference.Adam(BETAS, EPS), start.double()
    limited = reference.Fira(w, adam, LR, 1.0, 1.01).limited
    for g in steps(shape, 8):
        hp = optimizer.hyper(p, first=not optimizer.state.get(p))
        sketch = rule.projector.opened({}, hp)["basis"].double()
        p.grad = g
        optimizer.step()
        low = sketch.mT @ g.double() if shape[0] < shape[1] else g.double() @ sketch
        w = w - LR * limited(128**0.5 * g.double() * adam.direction(low).norm() / low.norm())
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=3e-5)
