"""Checkpoints that one number of ranks writes and another reads, by torch.distributed.checkpoint."""

from __future__ import annotations

import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from lowmem.errors import CheckpointError
from tests.contract import cases
from tests.distributed import steps
from tests.distributed.placing import sharded, spread
from tests.distributed.zoo import Zoo, gradient

CASES = [
    cases.case("adamw", writer="kahan"),
    cases.case("adamw_8bit"),
    cases.case("adafactor"),
    cases.case("galore"),
    cases.case("q_galore"),
    cases.case("galore", proj_type="right", states="int4"),
    cases.case("frugal", projector="randk"),
    cases.case("microadam"),
    cases.case("smmf"),
    cases.case("muon", states="int8"),
    cases.case("frugal", projector="none", schedule="blocks", switch_gap=100, density=0.5),
]
MORE = 2
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
READERS = (1, 3, 4)
"""Numbers of ranks that read what two have written."""
ELSEWHERE = {("adamw_8bit", 1)}
"""Where a tensor has another rule on so many ranks than on two: its shards start on blocks."""
WITHIN = 1e-2
"""How far apart the next steps may lead, as a share of the way: sums over ranks have another order."""


def table() -> str:
    """What the checks below hold, as Markdown."""
    heads = ["saved by 2 ranks", *(f"read by {n}" for n in READERS), f"{MORE} steps from there"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in CASES:
        read = ["refused" if (case.name, n) in ELSEWHERE else "every bit" for n in READERS]
        lines.append(f"| {' | '.join((f'`{case}`', *read, f'within {WITHIN:.0%} of the way'))} |")
    return "\n".join(lines)


def save_all(folder: Path, mesh: Any) -> list[str]:
    """Step, write checkpoints, step on, and tell where that led."""
    for case in CASES:
        model = sharded(_dtype(case), mesh)
        optimizer = _walk(case, model)
        states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(states, checkpoint_id=folder / str(case))
        held = told(model, optimizer)
        full = deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
        _steps(model, optimizer, steps.STEPS, steps.STEPS + MORE)
        after = {name: _whole(p) for name, p in model.named_parameters()}
        if dist.get_rank() == 0:
            torch.save((held, full, after), folder / f"{case}.pt")
    return []


def load_all(folder: Path, mesh: Any) -> list[str]:
    """Read them, sharded and full: every bit of weights and states, and the same steps from there."""
    found = []
    for case in CASES:
        for kind in ("sharded", "full"):
            try:
                wrong = _load(case, kind, folder, mesh)
                wrong += ["was read"] if (case.name, mesh.size()) in ELSEWHERE else []
            except CheckpointError as error:
                refused = (case.name, mesh.size()) in ELSEWHERE and "does not fit" in str(error)
                wrong = [] if refused else [str(error)]
            except CheckpointException as error:
                lacks = (case.name, mesh.size()) in ELSEWHERE and "Missing key" in str(error)
                wrong = [] if lacks else [str(error)[-500:]]
            except Exception:
                wrong = [traceback.format_exc()[-1500:]]
            found += [f"{case} {kind}: {line}" for line in wrong]
    return found


def _load(case: cases.Case, kind: str, folder: Path, mesh: Any) -> list[str]:
    model = sharded(_dtype(case), mesh) if mesh.size() > 1 else Zoo().to(_dtype(case))
    optimizer = case.optimizer(model, lr=0.5)  # the checkpoint knows better
    held, full, after = torch.load(folder / f"{case}.pt")
    states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(states, checkpoint_id=folder / str(case))
    set_model_state_dict(model, states["model"])
    if kind == "sharded":
        set_optimizer_state_dict(model, optimizer, states["optim"])
    else:
        given = full if dist.get_rank() == 0 else {}
        set_optimizer_state_dict(model, optimizer, given, options=FULL)
    found = [f"{key} is not what was saved" for key in differing(held, told(model, optimizer))]
    _steps(model, optimizer, steps.STEPS, steps.STEPS + MORE)
    for name, p in model.named_parameters():
        moved = float((after[name].float() - held[name].float()).norm())
        apart = float((_whole(p).float() - after[name].float()).norm())
        if not apart <= WITHIN * moved:
            found.append(f"{name}: {apart / moved:.1e} of the way apart after {MORE} steps")
    return found


def differing(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    missing = sorted(saved.keys() ^ now.keys())
    return missing + [key for key in saved.keys() & now.keys() if not _equal(saved[key], now[key])]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.nan_to_num(), b.nan_to_num())


def _dtype(case: cases.Case) -> torch.dtype:
    """Weights of 16 bits where a writer holds something of them."""
    return torch.bfloat16 if dict(case.options).get("writer") == "kahan" else torch.float32


def told(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and states, all rows."""
    names, found = [name for name, _ in model.named_parameters()], {}
    for name, p in model.named_parameters():
        found[name] = _whole(p)
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{names[i]} {key}": _whole(value) for key, value in state.items()}
    return found


def _whole(x: Any) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def _walk(case: cases.Case, model: nn.Module) -> Any:
    optimizer = case.optimizer(model, lr=steps.LR)
    _steps(model, optimizer, 0, steps.STEPS)
    return optimizer


def _steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(model.parameters()):
            g = gradient(tuple(p.shape), step, i, bad=False).to(p.dtype)
            p.grad = spread(g, p) if isinstance(p, DTensor) else g
        optimizer.step()
