"""What an optimizer checks: its numbers, whether compiling pays, whether saved state fits."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import CheckpointError, UserError

COMPILE_FROM = 1 << 23
"""`compile="auto"` compiles for models with at least this many parameters."""

COMPILE_WORK = 1_500_000_000
"""Elements stepped in a run, below which the eager steps take less time than compiling kernels."""


def pays(parameters: int, steps: int | None = None) -> bool:
    """Whether compiling the step pays for a model of this size, in a run of so many steps (if known).

    >>> pays(1_000_000_000), pays(1_000_000_000, steps=1), pays(1000)
    (True, False, False)
    """
    return parameters >= COMPILE_FROM and (steps is None or parameters * steps >= COMPILE_WORK)


def check_hyper(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, compile: str = "auto"
) -> None:
    """Refuse numbers outside their range, all at once."""
    bad = []
    if not 0.0 <= lr < math.inf:
        bad.append(f"lr must be at least 0, got {lr}")
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        bad.append(f"betas must be two numbers in [0, 1), got {betas}")
    if not 0.0 <= eps < math.inf:
        bad.append(f"eps must be at least 0, got {eps}")
    if not 0.0 <= weight_decay < math.inf:
        bad.append(f"weight_decay must be at least 0, got {weight_decay}")
    if compile not in ("auto", "on", "off"):
        bad.append(f"compile must be auto, on or off, got {compile!r}")
    if bad:
        raise UserError("; ".join(bad))


def unfit(p: Tensor, g: Tensor | None) -> str:
    """Why a gradient cannot be that of a parameter, and what to do; an empty string where it can.

    Args:
        p: the parameter; g: its gradient, None where it has no tensor.
    """
    if g is None:
        return ""
    if g.layout != torch.strided:
        return "it is sparse; set sparse=False on its embedding"
    if g.shape != p.shape:
        return (
            f"it has the shape {tuple(g.shape)}, the parameter {tuple(p.shape)}; give one like the parameter"
        )
    if not g.is_floating_point():
        return f"it is of {g.dtype}; give one of real numbers, such as {p.dtype}"
    return (
        "" if g.device == p.device else f"it is on {g.device}; move it to {p.device}, where the parameter is"
    )


def has_compiler() -> bool:
    """Whether kernels for the CPU can be built on this machine."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in names if name)


def check_saved(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state dict that belongs to another optimizer.

    Args:
        saved: the state dict; groups: those of the optimizer that is to load it.

    Raises:
        CheckpointError: saved by another strategy, for other parameters, or with keys of another type.
    """
    mine = groups[0]["strategy"] if groups else ""
    theirs = next((g.get("strategy") for g in saved["param_groups"] if g.get("strategy") != mine), mine)
    if theirs != mine:
        raise CheckpointError(
            f"optimizer state was saved by {theirs or 'another optimizer'}, this run is {mine}: "
            f"resume with the strategy and options it was saved with"
        )
    if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in groups]:
        raise CheckpointError(
            "optimizer state was saved for another set of parameters: resume the same model"
        )
    known = {i for g in saved["param_groups"] for i in g["params"]}
    strange = [key for key in saved["state"] if key not in known]
    if strange:
        raise CheckpointError(
            f"optimizer state of {strange[0]!r} belongs to no parameter of the checkpoint, whose keys are "
            f"{sorted(known, key=str)[:3]}...: a store that turns numbers into text does this; save what "
            f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives"
        )


def lost(steps: int) -> CheckpointError:
    """The error for a state dict of a run under way that holds no state."""
    return CheckpointError(
        f"the checkpoint is of step {steps} and holds no optimizer state: torch.distributed.checkpoint reads "
        f"what the optimizer that it loads into holds already; call init_state() on it first, or use "
        f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
    )


def check_fit(
    name: str, p: Tensor, given: Mapping[str, Any], needed: Mapping[str, Tensor], moves: bool
) -> None:
    """Refuse a parameter's saved state that is not what its rule holds.

    Args:
        name: of the parameter p.
        given: what was saved; needed: what is held, on `meta`.
        moves: whether the tensors that hold state change during a run.

    Raises:
        CheckpointError: other keys, shapes or dtypes.
    """
    saved, held = (
        {k: (tuple(v.shape), v.dtype) for k, v in state.items() if isinstance(v, Tensor)}
        for state in (given, needed)
    )
    if saved == held:
        return
    what = f"optimizer state of {name!r} {tuple(p.shape)}"
    if moves and saved.items() < held.items():
        # torch reads a flattened state dict by the keys of the optimizer that it is loaded into
        raise CheckpointError(
            f"{what} lacks {', '.join(sorted(held.keys() - saved.keys()))}: the tensors that hold state "
            f"change during this run, and a flattened state dict is read by the keys of a fresh optimizer; "
            f"save with flatten_optimizer_state_dict=False and torch.save, or, to load this one, set 'step' "
            f"of every group to one less than the steps it has taken and call init_state() first"
        )
    raise CheckpointError(
        f"{what} does not fit: the checkpoint is of another model, dtype or writer; resume with the settings "
        f"it was saved with"
    )
