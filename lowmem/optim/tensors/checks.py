"""What an optimizer checks: its numbers, and whether compiling pays."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import KindError, UserError

COMPILE_FROM = 1 << 23
"""`compile="auto"` compiles for models with at least this many parameters."""

BETAS, EPS = (0.9, 0.999), 1e-8
"""What the moments decay by, and what is added to their root, where nothing is said."""

COMPILE_WORK = 1_500_000_000
"""Elements stepped in a run, below which the eager steps take less time than compiling kernels."""


def pays(parameters: int, steps: int | None = None) -> bool:
    """Whether compiling the step pays for a model of this size, in a run of so many steps (if known).

    >>> pays(1_000_000_000), pays(1_000_000_000, steps=1), pays(1000)
    (True, False, False)
    """
    return parameters >= COMPILE_FROM and (steps is None or parameters * steps >= COMPILE_WORK)


def check_hyper(numbers: Mapping[str, Any]) -> None:
    """Refuse numbers of another type or outside their range, all at once.

    Args:
        numbers: lr, betas, eps, weight_decay, seed and compile, or some of them; others are not looked at.

    Raises:
        UserError: of the range; KindError, which is one: where there is a value of another type.
    """
    found = [check(numbers[key]) for key, check in _CHECKS.items() if key in numbers]
    if bad := [problem for problem in found if problem is not None]:
        kind = KindError if any(isinstance(problem, KindError) for problem in bad) else UserError
        raise kind("; ".join(str(problem) for problem in bad))


def _is_number(value: Any) -> bool:
    """Whether a value is one real number; a truth value is none."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def _rate(key: str, value: Any) -> UserError | None:
    if isinstance(value, Tensor) and value.numel() != 1:
        return UserError(f"a tensor {key} must have one element, got shape {tuple(value.shape)}")
    if not _is_number(value):
        return KindError(f"{key} must be a number, got {value!r}{_as_yaml_reads(value)}")
    if value >= 0.0 and _is_finite(value):
        return None
    return UserError(f"{key} must be at least 0 and finite, got {value}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _as_yaml_reads(value: Any) -> str:
    """What to do about a number that came as text."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return "" if math.isnan(number) else f": a text, as YAML reads 1e-3; give {number!r} without quotes"


def _betas(betas: Any) -> UserError | None:
    pair = [*betas] if isinstance(betas, Iterable) and not isinstance(betas, str | Mapping) else []
    kind = UserError if pair and all(_is_number(b) for b in pair) else KindError
    fine = kind is UserError and len(pair) == 2 and all(0.0 <= b < 1.0 for b in pair)
    return None if fine else kind(f"betas must be two numbers in [0, 1), as in (0.9, 0.999), got {betas!r}")


def _seed(seed: Any) -> UserError | None:
    fine = isinstance(seed, Integral) and not isinstance(seed, bool)
    return None if fine else KindError(f"seed must be a whole number, got {seed!r}")


def _compile(choice: Any) -> UserError | None:
    fine = choice in ("auto", "on", "off")
    return None if fine else UserError(f"compile must be auto, on or off, got {choice!r}")


_CHECKS: Mapping[str, Callable[[Any], UserError | None]] = {
    **{key: functools.partial(_rate, key) for key in ("lr", "eps", "weight_decay")},
    "betas": _betas,
    "seed": _seed,
    "compile": _compile,
}


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


def check_gradient(name: str, p: Tensor, g: Tensor | None) -> None:
    """Refuse what cannot be the gradient of a parameter, by the parameter's name."""
    if problem := unfit(p, g):
        raise UserError(f"gradient of {name!r}: {problem}")


def check_gradients(params: Iterable[tuple[str, Tensor]]) -> None:
    """`check_gradient` for those that have one."""
    for name, p in params:
        if p.grad is not None:
            check_gradient(name, p, p.grad)


def idle(name: str, rules: Iterable[Any], *, betas: Sequence[float], eps: float) -> list[str]:
    """A sentence for each number that was set and that no rule of a strategy reads.

    Args:
        name: of the strategy; rules: all of its rules. One says in `uses` which numbers it reads.
        betas, eps: as given; the defaults are not asked for.
    """
    used = {number for rule in rules for number in rule.uses}
    pair = isinstance(betas, (tuple, list))  # what is none is refused by `check_hyper`
    given = {"betas": pair and tuple(betas) != BETAS, "eps": eps != EPS}
    return [
        f"{number}: no rule of {name} reads it, it would have no effect; leave it out"
        for number in given
        if given[number] and number not in used
    ]


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
