"""What an optimizer checks: its numbers, whether compiling pays, whether saved state fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from lowmem.errors import CheckpointError, UserError

COMPILE_FROM = 1 << 23
"""`compile="auto"` compiles for models with at least this many parameters."""

COMPILE_WORK = 3_000_000_000
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
    if not lr >= 0.0:
        bad.append(f"lr must be at least 0, got {lr}")
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        bad.append(f"betas must be two numbers in [0, 1), got {betas}")
    if not eps >= 0.0:
        bad.append(f"eps must be at least 0, got {eps}")
    if not weight_decay >= 0.0:
        bad.append(f"weight_decay must be at least 0, got {weight_decay}")
    if compile not in ("auto", "on", "off"):
        bad.append(f"compile must be auto, on or off, got {compile!r}")
    if bad:
        raise UserError("; ".join(bad))


def has_compiler() -> bool:
    """Whether kernels for the CPU can be built on this machine."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in names if name)


Held = Mapping[str, tuple[tuple[int, ...], object]]
"""Shape and dtype of each state tensor of a parameter."""


def misfit(name: str, shape: tuple[int, ...], given: Held, needed: Held, moves: bool) -> CheckpointError:
    """The error for a parameter's saved state that is not what its rule holds.

    Args:
        name: of the parameter; shape: its own.
        given: what was saved; needed: what is held.
        moves: whether the tensors that hold state change during a run.
    """
    what = f"optimizer state of {name!r} {tuple(shape)}"
    if moves and given.items() < needed.items():
        # torch reads a flattened state dict by the keys of the optimizer that it is loaded into
        return CheckpointError(
            f"{what} lacks {', '.join(sorted(needed.keys() - given.keys()))}: the tensors that hold state "
            f"change during this run, and a flattened state dict is read by the keys of a fresh optimizer; "
            f"save with flatten_optimizer_state_dict=False and torch.save, or, to load this one, set 'step' "
            f"of every group to one less than the steps it has taken and call init_state() first"
        )
    return CheckpointError(
        f"{what} does not fit: the checkpoint is of another model, dtype or writer; resume with the settings "
        f"it was saved with"
    )
