"""Checkpoints in the forms that ranks write, read into an optimizer that has taken no step."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from tiny_runs import trainer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lowmem
from lowmem.errors import CheckpointError, UserError
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.training.folder import forms

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OPTIONS: dict[str, dict[str, Any]] = {
    "badam": {"switch_gap": 1},
    "lisa": {"switch_gap": 1, "count": 1},
    "misa": {"switch_gap": 1, "share": 0.5},
    "adamw": {},
    "sgd": {},
    "signsgd": {},
    "sinkgd": {},
    "lomo": {},
}
STEPS = 3
"""After which other blocks have their turn than at the first."""


class Net(nn.Module):
    """Numbered layers, one of which gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.idle = nn.ModuleList([nn.Linear(8, 8, bias=False)])


def made(name: str, options: dict[str, Any]) -> tuple[Net, LowMemOptimizer]:
    model = Net()
    return model, lowmem.optimizer(model, name, lr=1e-2, weight_decay=0.0, **options)


def walk(model: Net, optimizer: LowMemOptimizer, first: int, last: int) -> None:
    for t in range(first, last):
        for i, layer in enumerate(model.layers):
            g = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * t + i))
            layer.weight.grad = g if layer.weight.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()


def saved(folder: Path, form: str, model: Net, optimizer: LowMemOptimizer) -> None:
    """As accelerate leaves them, and one process."""
    if form == "plain":
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return
    state = get_optimizer_state_dict(model, optimizer)
    if form == "full":
        torch.save(state, folder / "optimizer.bin")
    else:
        dcp.save({"optimizer": state}, checkpoint_id=folder / "optimizer_0", no_dist=True)


@pytest.mark.parametrize("form", ["plain", "full", "sharded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_fresh_optimizer_goes_on_from_a_checkpoint_of_any_form(
    name: str, form: str, tmp_path: Path
) -> None:
    """Of all, one layer never had a gradient."""
    model, whole = made(name, OPTIONS[name])
    walk(model, whole, 0, STEPS)
    saved(tmp_path, form, model, whole)
    again, fresh = made(name, OPTIONS[name])
    again.load_state_dict(model.state_dict())
    forms.load_optimizer_(tmp_path, form, again, fresh, forms.turn_of(whole))
    walk(model, whole, STEPS, STEPS + 3)
    walk(again, fresh, STEPS, STEPS + 3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert [g["step"] for g in fresh.param_groups] == [STEPS + 3]


def test_what_torch_cannot_read_of_a_sharded_checkpoint_is_said_in_a_line(tmp_path: Path) -> None:
    model, optimizer = made("adamw", {})
    walk(model, optimizer, 0, 1)
    saved(tmp_path, "sharded", model, optimizer)
    for path in (tmp_path / "optimizer_0").glob("*.distcp"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot resume from .*: .*No such file.*; resume") as raised:
        forms.load_optimizer_(tmp_path, "sharded", *made("adamw", {}), forms.turn_of(optimizer))
    assert "\n" not in str(raised.value)


def test_a_full_disk_that_a_rank_met_is_said_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, folder: str) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        raise CheckpointException("write", {1: (full, None)})

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(UserError, match=r"could not write .*checkpoint-1 .*No space left"):
        trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
