"""State that travels by real streams: the same bits, two slots, and a host that never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.optim.release import release

pytestmark = pytest.mark.cuda
SIDE = 1024


def build(name: str, away: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE, SIDE) for _ in range(6)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    rank = {"rank": 16, "update_proj_gap": 3} if name == "galore" else {}
    return model, lowmem.optimizer(model, name, lr=1e-3, weight_decay=0.1, offload_state=away, **rank)


def advance(model: nn.Module, optimizer: Any, step: int) -> None:
    x = torch.randn(64, SIDE, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("released", [False, True], ids=["step", "release"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "galore", "adafactor", "muon"])
def test_the_same_bits_by_real_streams(name: str, released: bool) -> None:
    ends = []
    for away in (False, True):
        model, optimizer = build(name, away)
        if released:
            release(optimizer)
        for step in range(6):
            advance(model, optimizer, step)
        state = optimizer.state_dict()["state"]
        ends.append(([p.detach().cpu() for p in model.parameters()], state))
    (weights, here), (others, there) = ends
    assert all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))
    for i, held in here.items():
        assert all(torch.equal(x.cpu(), there[i][key].cpu()) for key, x in held.items()), i
    assert all(x.is_pinned() for p in model.parameters() if p.dim() == 2 for x in optimizer.state[p].values())


def test_the_card_holds_two_slots_and_the_host_does_not_wait() -> None:
    model, optimizer = build("adamw", True)
    for step in range(3):
        advance(model, optimizer, step)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    largest = 8 * SIDE * SIDE
    assert len(optimizer.home.buffers) == 2
    assert sum(len(room) for room in optimizer.home.buffers) <= 2 * largest + 4096
    assert optimizer.state_bytes() > 6 * largest
