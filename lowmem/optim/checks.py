"""What an optimizer checks: its numbers, and whether compiling pays."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import UserError

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


def check_hyper(numbers: Mapping[str, Any]) -> None:
    """Refuse numbers outside their range, all at once.

    Args:
        numbers: lr, betas, eps, weight_decay and compile, or some of them; others are not looked at.
    """
    bad = []
    for key in ("lr", "eps", "weight_decay"):
        value = numbers.get(key, 0.0)
        if isinstance(value, Tensor) and value.numel() != 1:
            bad.append(f"a tensor {key} must have one element, got shape {tuple(value.shape)}")
        elif not 0.0 <= value < math.inf:
            bad.append(f"{key} must be at least 0, got {value}")
    betas = numbers.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        bad.append(f"betas must be two numbers in [0, 1), got {betas}")
    if numbers.get("compile", "auto") not in ("auto", "on", "off"):
        bad.append(f"compile must be auto, on or off, got {numbers['compile']!r}")
    if bad:
        raise UserError("; ".join(bad))


def check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    """Refuse a gradient that is not one number for each of the parameter's."""
    if g.layout != torch.strided:
        raise UserError(f"sparse gradient for {name!r}: set sparse=False on its embedding")
    if g.shape != p.shape:
        raise UserError(f"gradient of {name!r} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")


def has_compiler() -> bool:
    """Whether kernels for the CPU can be built on this machine."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in names if name)


def compiles(choice: str, params: Sequence[Tensor], steps: int | None) -> bool:
    """Whether the step of these parameters is compiled, by choice (auto, on, off) and steps of the run."""
    if choice != "auto":
        return choice == "on"
    if not pays(sum(p.numel() for p in params), steps):
        return False
    return has_compiler() or all(p.device.type != "cpu" for p in params)
