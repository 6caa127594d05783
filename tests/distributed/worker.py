"""Steps of ranks that hold the rows of weights, against one device; and their tasks by name."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowmem.memory.count import model_state_bytes
from tests.contract.cases import Case
from tests.distributed import counting, moving, resharding, steps
from tests.distributed.placing import rows, sharded, spread
from tests.distributed.zoo import Net, Zoo

Found = list[str]
Task = Callable[[Path, Any], Found]


def step_all(folder: Path, mesh: Any) -> Found:
    """Every strategy, against one device."""
    found = []
    for case, dtype in steps.chosen(mesh.size()):
        told = f"{case} {str(dtype)[6:]}"
        try:
            found += [f"{told} {line}" for line in one(case, dtype, folder, mesh)]
        except Exception:
            found.append(f"{told}: {traceback.format_exc()[-1500:]}")
    weighed = moving.moved(mesh, moving.FEW) if mesh.size() == 2 else []
    return found + counting.held(mesh) + counting.exchanged(mesh) + weighed


def one(case: Case, dtype: torch.dtype, folder: Path, mesh: Any) -> Found:
    """What is wrong with the rows that this rank holds after the steps of a strategy."""
    model, start = sharded(dtype, mesh), dict(Zoo().to(dtype).named_parameters())
    example = next(model.parameters())
    optimizer = steps.walk(case, model, lambda g: spread(g, example))
    wanted, found, noise = torch.load(folder / f"{steps.key(case, dtype)}.pt"), Found(), [0.0, 0.0]
    plain = torch.load(folder / f"{steps.key(case, torch.float32)}.pt")
    for name, p in model.named_parameters():
        said = f"small {name}" if steps.cut(optimizer, p) else name
        own, one_device, in_fp32 = p.detach().to_local(), *(rows(x[said], p) for x in (wanted, plain))
        moved = float((wanted[said].float() - start[name].detach().float()).norm())
        off = float((own.float() - one_device.float()).norm())
        if not steps.exact(optimizer, p) and dtype != torch.float32:
            for i, weight in enumerate((own, one_device)):
                noise[i] += float((weight.float() - in_fp32).square().sum())
            continue
        most = steps.apart(optimizer, p, case.name)
        if not off <= most * moved:
            way = optimizer.ready(p)[0].way
            found.append(f"{name} by {way}: {off / moved:.1e} of the way apart, {most:.0e} allowed")
    decided = steps.decided(optimizer)
    where = {"ranks": mesh.size(), "rank": mesh.get_rank(), "step": steps.STEPS - 1, "decided": decided}
    planned = model_state_bytes(case.create(), Zoo().to(dtype), **where)
    if planned != (held := optimizer.state_bytes()):
        found.append(f"holds {held} bytes of state, {planned} were counted")
    if not steps.alike(*(json.loads(text or "{}") for text in (wanted["decided"], decided))):
        found.append(f"decided {decided}, on one device {wanted['decided']}")
    counted = torch.tensor(optimizer.nonfinite())
    dist.all_reduce(counted)
    if not any(steps.cut(optimizer, p) for p in model.parameters()) and counted != wanted["nonfinite"]:
        found.append(f"{counted} elements were not stepped, on one device {wanted['nonfinite']}")
    here, there = (x**0.5 for x in noise)
    if not here <= steps.WORSE * there:
        found.append(f"is {here:.1e} from steps in fp32, one device {there:.1e}")
    return found


def plain_loop(given: Path, mesh: Any) -> Found:
    """Forward, backward and step, as a user writes them: the losses and weights of one process."""
    found = []
    if mesh.size() == 4:  # copies of each shard on two ranks
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for name, clip in (*((name, "") for name in steps.LOOPS), *((name, "tensor") for name in steps.RELEASED)):
        models = [Net(), Net()]
        fully_shard(models[1].up, mesh=mesh)
        fully_shard(models[1], mesh=mesh)
        assert all(isinstance(p, DTensor) for p in models[1].parameters()), "nothing was sharded"
        one, many = (steps.loop(name, model, clip) for model in models)
        if not max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-5:
            found.append(f"{name} {clip}: {many} are not the losses of one process, {one}")
        for (key, whole), p in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if not (off := _most(p, whole)) <= 1e-4:
                found.append(f"{name} {clip} {key}: {off:.1e} apart")
    return found


def _most(p: Any, one: torch.Tensor) -> float:
    off = (p.detach().to_local() - rows(one.detach(), p)).abs()
    return float(off.max()) if off.numel() else 0.0


TASKS: dict[str, Task] = {
    "step": step_all,
    "loop": plain_loop,
    "moved": lambda _, mesh: moving.moved(mesh),
    "save": resharding.save_all,
    "load": resharding.load_all,
}
