"""State dicts that other tests of resuming do not meet: codes, stacks, states that were only looked at."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.int8.tensor import Int8Weight

Make = Callable[[], nn.Parameter]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded() -> nn.Parameter:
    return nn.Parameter(Int8Weight.of(normal(6, 17)))


def stack() -> nn.Parameter:
    return nn.Parameter(normal(3, 4, 5).bfloat16())


def step(optimizer: lowmem.LowMemOptimizer, p: nn.Parameter, seed: int) -> None:
    p.grad = normal(*p.shape, seed=seed).to(p.dtype)
    optimizer.step()


def leaves(p: Tensor) -> list[Tensor]:
    return [x for x in (p.detach(),) if not isinstance(x, Int8Weight)] or [p.detach().decode()]


@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        (coded, "adamw", {"writer": "eco"}),
        (coded, "galore", {"writer": "eco", "rank": 2}),
        (coded, "adamw_8bit", {"writer": "eco"}),
        *((stack, "galore", {"writer": w, "rank": 2}) for w in ("kahan", "split")),
        *((stack, method, {"writer": "kahan"}) for method in ("muon", "came", "dion")),
    ],
)
def test_codes_and_stacks_resume_exactly(make: Make, method: str, options: dict[str, Any]) -> None:
    p = make()
    optimizer = lowmem.optimizer([("w", p)], method, lr=1e-2, **options)
    for seed in (1, 2):
        step(optimizer, p, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make()
    with torch.no_grad():
        again.copy_(p)
    loaded = lowmem.optimizer([("w", again)], method, lr=1e-2, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one, steps in ((p, optimizer), (again, loaded)):
        step(steps, one, 3)
    for a, b in zip(leaves(p), leaves(again), strict=True):
        assert torch.equal(a, b)
    mine, theirs = optimizer.state[p], loaded.state[again]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_state_that_was_looked_at_is_no_misfit() -> None:
    def made() -> tuple[list[nn.Parameter], lowmem.LowMemOptimizer]:
        params = [nn.Parameter(normal(4, 4)), nn.Parameter(normal(4, 4))]
        return params, lowmem.optimizer(params, "adamw")

    (a, b), optimizer = made()
    step(optimizer, a, 1)
    assert not optimizer.state[b]
    params, loaded = made()
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[params[0]].keys() == optimizer.state[a].keys()
    step(loaded, params[1], 1)
    assert loaded.state[params[1]]


def test_options_of_a_method_are_not_those_of_a_group() -> None:
    group = {"params": [nn.Parameter(normal(8, 8))], "rank": 3}
    with pytest.raises(UserError, match="sets rank, which the method has for all tensors"):
        lowmem.optimizer([group], "galore")
    assert "step" not in group
    lowmem.optimizer([{**group, "rank": 4}], "galore", rank=4)
