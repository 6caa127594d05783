"""What is held of a tensor between steps: a flat dict of plain tensors with dotted keys.

Keys, shapes and dtypes are fixed by `init`, which looks at shape, dtype and device
alone, so that it runs on the meta device: the code that allocates is the code that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

State = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Constant:
    """A tensor that steps read and never change.

    Args:
        name: the same for all that is the same: an optimizer holds one for each name and device.
        make: makes it on a device.
    """

    name: str
    make: Callable[[torch.device], Tensor]


Constants = Mapping[str, Constant]
"""Constants by the key under which a state shows them."""


def made(
    constants: Constants, device: torch.device, held: dict[tuple[str, torch.device], Tensor] | None = None
) -> State:
    """Constants on a device: those that are `held` already, by name and device, or new ones, then held."""
    held = {} if held is None else held
    for constant in constants.values():
        if (constant.name, device) not in held:
            held[constant.name, device] = constant.make(device)
    return {key: held[constant.name, device] for key, constant in constants.items()}


class Held(State):
    """A state whose tensors are neither replaced nor given other storage: what is derived is kept with it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.parts: dict[str, Held] = {}
        self.layouts: dict[tuple[int, int, bool], Any] = {}
        self.course: Any = None


def scoped(state: Mapping[str, Tensor], scope: str) -> State:
    """The part of a state under a dotted prefix, without it.

    >>> sorted(scoped({"inner.age": torch.zeros(()), "basis": torch.zeros(2)}, "inner"))
    ['age']
    """
    parts = state.parts if isinstance(state, Held) else {}
    if scope not in parts:
        head = f"{scope}."
        parts[scope] = Held({k[len(head) :]: value for k, value in state.items() if k.startswith(head)})
    return parts[scope]


def prefixed(scope: str, state: Mapping[str, T]) -> dict[str, T]:
    """A state, or constants, put under a dotted prefix; an empty key becomes the prefix itself."""
    return {f"{scope}.{key}" if key else scope: value for key, value in state.items()}


def part(state: Mapping[str, Tensor], name: str) -> State:
    """What a codec holds of one moment: the inverse of `prefixed`."""
    return {"": state[name]} if name in state else scoped(state, name)


def stored(held: Iterable[Any]) -> int:
    """Bytes of what tensors lie in, every storage once; what else is held does not count."""
    storages = [x.untyped_storage() for x in held if isinstance(x, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def apply_in_place(state: State, new: Mapping[str, Tensor]) -> None:
    """Store new values under the same keys, into the same memory."""
    for key, value in new.items():
        state[key].copy_(value)


def reset_(state: State, fresh: State, ok: Tensor) -> None:
    """Put a state back to what init gives, in place (zeros are not always code 0).

    Args:
        state: of any size.
        fresh: what init gives for a tensor of one element: each has one value throughout; those that the
            state does not have are left out.
        ok: 0-D bool; where it is False, nothing happens.
    """
    for key, value in ((key, value) for key, value in fresh.items() if key in state):
        state[key].masked_fill_(ok, value.view(-1)[0])
