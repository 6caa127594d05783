"""A mark on tensors that a schedule has put aside, and that no gradient is made for.

What rests does not require a gradient: the backward pass makes none and stops where nothing below needs
one, and the forward pass keeps nothing for it. It is still trained, only not now. That is marked
on the tensor, so that everyone who asks what is trained, a second optimizer too, gets the whole answer.

torch copies no attribute of a parameter with it: a model carries something that marks its copies.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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


class _Copied:
    """Marks the parameters of a deep copy of a model as those of the model are; pickled, it is an empty dict.

    Args:
        owner: the model.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = weakref.ref(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = self.owner()
        if owner is None or id(owner) not in memo:  # it is not the model that is copied
            return {}
        for p in owner.parameters():
            if rests(p) and not (other := copy.deepcopy(p, memo)).requires_grad:
                mark_(other)
        return type(self)(memo[id(owner)])

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # a parameter is pickled with its mark, and a file is to need nothing of ours


def carry_(owner: nn.Module) -> None:
    """Let deep copies of a model know who rests."""
    vars(owner)[_MARK] = _Copied(owner)


def drop_(owner: nn.Module) -> None:
    """Leave a model as it was before `carry_`."""
    vars(owner).pop(_MARK, None)
