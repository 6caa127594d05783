"""Runs of the Trainer whose model is spread over ranks, against runs of one process."""

from __future__ import annotations

import json
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from tiny_models import tiny
from tiny_runs import Rows, logged, trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lowmem.errors import ConfigError, UserError
from lowmem.optim.shards import gathered
from tests.distributed.on_cpu import let_cpus_shard

GALORE = {"optim": "galore", "optim_args": "rank=4,update_proj_gap=2,proj_type=right"}
RUNS: dict[str, dict[str, Any]] = {
    "galore": {**GALORE},
    "accumulated": {**GALORE, "gradient_accumulation_steps": 2},
    "released": {**GALORE, "gradient_release": True},
    "turns": {"optim": "badam", "optim_args": "switch_gap=2"},
    "probed": {"optim": "mezo"},
}
"""Runs that take the same rows in the same steps on any number of ranks."""
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
STEPS, HALF = 4, 2
APART = 1e-4
"""How far losses and norms may be apart whose sums have another order."""


def make(name: str, folder: Path, ranks: int = 1, kind: str = SHARDED, **more: Any) -> Any:
    """A run of `RUNS`; it is spread where there are several ranks."""
    values = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": HALF, **RUNS[name], **more}
    rows = 4 // ranks // values.get("gradient_accumulation_steps", 1)
    spread = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}} if ranks > 1 else {}
    return trainer(folder, held=Rows(3), per_device_train_batch_size=rows, **{**spread, **values})


def told(run: Any) -> dict[str, Any]:
    """What a run can be compared by: losses, norms, weights."""
    numbers = {key: logged(run, key) for key in ("loss", "grad_norm", "nonfinite_elements")}
    return {**numbers, "weights": {name: gathered(p.detach()) for name, p in run.model.named_parameters()}}


def unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two runs are further apart than sums in another order explain."""
    found = []
    for key in ("loss", "grad_norm", "nonfinite_elements"):
        if len(one[key]) != len(other[key]) or any(
            abs(a - b) > APART * abs(a) for a, b in zip(one[key], other[key], strict=False)
        ):
            found.append(f"{key}: {one[key]} and {other[key]}")
    pairs = ((name, float((w - other["weights"][name]).abs().max())) for name, w in one["weights"].items())
    return found + [f"{name}: {off:.1e} apart" for name, off in pairs if off > APART]


def same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Weights that differ in a bit."""
    return [name for name, w in one["weights"].items() if not torch.equal(w, other["weights"][name])]


def train_all(given: Path, mesh: Any) -> list[str]:
    """Every check; `given` has the runs of one process, and what is written there is for it to read."""
    let_cpus_shard()
    warnings.simplefilter("ignore")
    found = []
    for check in (as_one_process, resumed, other_forms, refused):
        try:
            found += [f"{check.__name__}: {line}" for line in check(given, mesh.size())]
        except Exception:
            found.append(f"{check.__name__}: {traceback.format_exc()[-2000:]}")
        dist.barrier()
    return found


def _run(
    name: str, folder: Path, ranks: int, before: Callable[[Any], None] | None = None, **more: Any
) -> Any:
    AcceleratorState._reset_state()
    resume = more.pop("resume", False)
    run = make(name, folder, ranks, **more)
    if before is not None:
        before(run)
    run.train(resume_from_checkpoint=resume)
    return run


def as_one_process(given: Path, ranks: int) -> list[str]:
    """Losses, norms and weights of each run; and rank by rank a part of the state."""
    found = []
    for name in RUNS:
        run = _run(name, given / (f"whole-{SHARDED}" if name == "galore" else f"spread-{name}"), ranks)
        if name == "galore":
            torch.save(told(run), given / f"whole-{SHARDED}-{dist.get_rank()}.pt")
        if not all(isinstance(p, DTensor) for p in run.model.parameters()):
            found.append(f"{name}: nothing was sharded")
        one = torch.load(given / f"{name}.pt")
        found += [f"{name} {line}" for line in unlike(one, told(run))]
        if name != "probed" and not run.lowmem_optimizer.state_bytes() < 0.7 * one["state_bytes"]:
            found.append(f"{name}: a rank holds {run.lowmem_optimizer.state_bytes()} bytes of state")
    return found


def resumed(given: Path, ranks: int) -> list[str]:
    """A run that goes on from its middle, evaluated first, ends with the same bits; and leaves a model."""
    found, losses = [], []
    for kind in (SHARDED, FULL):
        folder = given / f"whole-{kind}"
        if kind == SHARDED:
            whole = torch.load(given / f"whole-{SHARDED}-{dist.get_rank()}.pt")
        else:
            whole = told(_run("galore", folder, ranks, kind=kind))
        half = _only_half(folder, given / f"half-{kind}")
        run = _run(
            "galore",
            half,
            ranks,
            lambda run: losses.append(run.evaluate()["eval_loss"]),
            kind=kind,
            resume=True,
        )
        found += [f"{kind} {name}: another run" for name in same(whole, told(run))]
        run.save_model(str(given / f"model-{kind}"))
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(given / f"model-{kind}")
        for name, p in model.named_parameters():
            if not torch.equal(p, whole["weights"][name]):
                found.append(f"{kind} {name}: not in the model that was left")
    return found + ([] if len(set(losses)) == 1 else [f"evaluated to {losses}"])


def other_forms(given: Path, ranks: int) -> list[str]:
    """Checkpoints of one process, and those of ranks in the other form, lead to the same end."""
    found, one = [], torch.load(given / "galore.pt")
    for source, kind in ((given / "one", SHARDED), (given / f"whole-{FULL}", SHARDED)):
        half = _only_half(source, given / f"half-{source.name}-{kind}")
        run = _run("galore", half, ranks, kind=kind, resume=True)
        found += [f"{source.name} by {kind} {line}" for line in unlike(one, told(run))]
    return found


def _only_half(source: Path, folder: Path) -> Path:
    """A copy of a run's folder with the checkpoint of its middle alone."""
    if dist.get_rank() == 0:
        shutil.copytree(source / f"checkpoint-{HALF}", folder / f"checkpoint-{HALF}")
    dist.barrier()
    return folder


def refused(given: Path, ranks: int) -> list[str]:
    """What accelerate would do without a word."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("take version 2", {"fsdp_config": {"version": 1}}),
        ("cpu_offload", {"fsdp_config": {"cpu_offload": True}}),
        ("fp16", {"fp16": True}),
        (
            "float32 copies of such weights: 17,472 bytes more",
            {"bf16": True, "model": tiny(dtype=torch.bfloat16)},
        ),
    ]
    found = []
    for words, values in cases:
        try:
            _run("galore", given / "refused", ranks, **values)
        except (ConfigError, UserError) as error:
            found += [] if words in str(error) else [f"{words}: {error}"]
        else:
            found.append(f"{words}: not refused")
    return found


def settled(given: Path) -> dict[str, list[str]]:
    """Names of a checkpoint's files by the run that wrote it."""
    folders = {kind: given / f"whole-{kind}" / f"checkpoint-{STEPS}" for kind in (SHARDED, FULL)}
    listed = {
        kind: json.loads((folder / "manifest.json").read_text())["files"] for kind, folder in folders.items()
    }
    return {kind: sorted(files) for kind, files in listed.items()}
