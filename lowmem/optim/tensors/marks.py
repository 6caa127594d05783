"""A mark on tensors that a schedule has put aside, and that no gradient is made for.

What rests does not require a gradient: the backward pass makes none and stops where nothing below needs
one, and the forward pass keeps nothing for it. It is still trained, only not now. That is marked
on the tensor, so that everyone who asks what is trained, a second optimizer too, gets the whole answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_MARK = "_lowmem_rests"


def trains(p: Tensor) -> bool:
    """Whether a parameter is trained, at this step or at another."""
    return p.requires_grad or rests(p)


def has_turns(p: Tensor) -> bool:
    """Whether a schedule gives it a turn: one that is frozen, or has no element, would waste it."""
    return trains(p) and p.numel() > 0


def rests(p: Tensor) -> bool:
    """Whether a parameter was put aside."""
    return bool(getattr(p, _MARK, False))


def mark_(p: Tensor) -> None:
    """Say of a parameter that does not require a gradient that it was put aside."""
    setattr(p, _MARK, True)


def rest_(p: Tensor) -> None:
    """Put a parameter aside; one that is frozen for good stays so."""
    if p.requires_grad:
        p.requires_grad_(False)
        p.grad = None
        mark_(p)


def wake_(p: Tensor) -> None:
    """Take a parameter up again, where it was put aside."""
    if rests(p):
        delattr(p, _MARK)
        p.requires_grad_(True)


@contextmanager
def awake(p: Tensor) -> Iterator[None]:
    """While a hook is put on a parameter, which needs one that requires a gradient."""
    asleep = rests(p)
    wake_(p)
    try:
        yield
    finally:
        if asleep:
            rest_(p)
