"""Runs of the Trainer that go on from the checkpoint of two ranks on another number of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from tiny_runs import Rows, logged, trainer

from tests.distributed.on_cpu import let_cpus_shard
from tests.distributed.resharding import differing, told

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
METHODS: dict[str, dict[str, Any]] = {
    "galore": {"optim": "galore", "optim_args": "rank=4,update_proj_gap=2,proj_type=auto"},
    "turns": {"optim": "badam", "optim_args": "switch_gap=1"},
    "stateless": {"optim": "signsgd", "learning_rate": 1e-4},
}
RUNS = [
    ("galore", SHARDED),
    ("galore", FULL),
    ("turns", SHARDED),
    ("turns", FULL),
    ("stateless", FULL),
    ("stateless", SHARDED),
]
STEPS, HALF, ROWS = 4, 2, 12
WITHIN = 1e-6
"""How far apart losses may be, as a share: sums over ranks have another order."""


class Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """Weights and state of all ranks after so many steps, or where a run that was resumed begins."""

    def __init__(self, run: Any) -> None:
        self.run, self.held = run, dict[str, torch.Tensor]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what was loaded."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is saved next."""
        if state.global_step == HALF:
            self.held = told(self.run.model, self.run.lowmem_optimizer)


def walk(name: str, kind: str, folder: Path, ranks: int, resume: bool) -> dict[str, Any]:
    """A run, or the second half of it: what it held in the middle, its side, the losses from there."""
    AcceleratorState._reset_state()
    spread = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}} if ranks > 1 else {}
    each = {"per_device_train_batch_size": ROWS // ranks, "max_steps": STEPS}
    saves = {"save_strategy": "steps", "save_steps": HALF}
    run = trainer(folder, rows=Rows(STEPS * ROWS), **each, **saves, **METHODS[name], **spread)
    run.add_callback(seen := Seen(run))
    run.train(resume_from_checkpoint=resume)
    side = run.lowmem_optimizer.strategy.options.get("proj_type")
    return {"held": seen.held, "side": side, "losses": logged(run, "loss")[HALF:]}


def unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is wrong with a run that goes on from another's middle."""
    found = [f"{key} is not what was saved" for key in differing(one["held"], other["held"])]
    if one["side"] != other["side"]:
        found.append(f"projects {other['side']}, not {one['side']}")
    apart = [abs(a - b) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True)]
    return found + ([f"losses are {max(apart):.1e} apart"] if max(apart) > WITHIN else [])


def chosen(given: Path) -> list[tuple[str, str]]:
    """The runs that the test has named in a file."""
    return [RUNS[i] for i in json.loads((given / "runs.json").read_text())]


def write(given: Path, mesh: Any) -> list[str]:
    """Two ranks: runs whose checkpoints others read."""
    let_cpus_shard()
    for name, kind in chosen(given):
        found = walk(name, kind, given / f"{name}-{kind}", mesh.size(), resume=False)
        if dist.get_rank() == 0:
            torch.save(found, given / f"{name}-{kind}.pt")
    return []


def write_alone(given: Path) -> None:
    """One process: a run that ranks read, which has decided otherwise than they would."""
    name, _ = RUNS[0]
    (given / "runs.json").write_text("[0]")
    torch.save(
        walk(name, SHARDED, given / f"{name}-{SHARDED}", 1, resume=False), given / f"{name}-{SHARDED}.pt"
    )


def read(given: Path, mesh: Any) -> list[str]:
    """Other ranks: the same runs from their middle."""
    let_cpus_shard()
    return read_by(given, mesh.size())


def read_by(given: Path, ranks: int) -> list[str]:
    """What goes wrong on so many ranks."""
    found = []
    for name, kind in chosen(given):
        folder = given / f"{name}-{kind}-by-{ranks}"
        if ranks == 1 or dist.get_rank() == 0:
            shutil.copytree(given / f"{name}-{kind}" / f"checkpoint-{HALF}", folder / f"checkpoint-{HALF}")
        if ranks > 1:
            dist.barrier()
        one, other = torch.load(given / f"{name}-{kind}.pt"), walk(name, kind, folder, ranks, resume=True)
        found += [f"{name} {kind} by {ranks}: {line}" for line in unlike(one, other)]
    return found
