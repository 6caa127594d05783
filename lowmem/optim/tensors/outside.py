"""How state stands in a checkpoint: the same on one device and on any number of ranks.

Inside, a rank holds plain tensors for its rows. Outside, a tensor that grows with the rows of
its weight has rows itself: as many as the weight, or as there are groups of rows in which
blocks of a codec come out even, the last group filled up with zeros. So it is a `DTensor`
beside a sharded weight, and torch.distributed.checkpoint cuts it anew for another number
of ranks. What does not grow is the same on all ranks, and goes out as it is, contiguous:
some stores send memory as it lies.

Which tensors grow is found by making state of all rows, of some and of none, on `meta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.shards import Shard, local
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.seats import Place, fresh
from lowmem.optim.terms.state import State

META = torch.device("meta")


@dataclass(frozen=True)
class Form:
    """A tensor with rows.

    Args:
        group: rows of the weight for each of its rows; entries: along its first dimension, for a group.
        plain: it has a row for each of the weight already.
    """

    group: int
    entries: int
    plain: bool

    def out(self, value: Tensor, rows: int) -> Tensor:
        """What is held of so many rows of the weight, as rows."""
        value = value.contiguous()
        if value.dtype == torch.int16:  # which no backend gathers
            value = value.view(torch.uint8)
        if self.plain:
            return value
        groups = -(-rows // self.group)
        missing = groups * self.entries - value.shape[0]
        if missing:
            value = torch.cat((value, value.new_zeros(missing, *value.shape[1:])))
        return value.reshape(groups, self.entries, *value.shape[1:])

    def back(self, value: Tensor, needed: Tensor) -> Tensor:
        """What is held, from rows: the inverse of `out`."""
        flat = value if self.plain else value.flatten(0, 1)[: needed.shape[0]]
        return flat.view(torch.int16) if needed.dtype == torch.int16 and flat.dtype == torch.uint8 else flat


Forms = Mapping[str, Form]


def forms(strategy: Strategy, rule_name: str, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Forms:
    """The form of each state tensor that grows with the rows of a weight."""
    if not shape or not shape[0]:
        return {}
    one = Shard.of(shape, 1, 0)
    way = strategy.way(rule_name, role, one)
    if way == "whole":
        return {}
    every, none = (fresh(strategy, rule_name, role, s, dtype, META) for s in (one, replace(one, rank=1)))
    growing = [key for key, value in every.items() if value.shape != none[key].shape]
    found = {key: Form(1, 1, plain=True) for key in growing if every[key].shape[0] == shape[0]}
    rest = [key for key in growing if key not in found]
    group = 1
    while rest:
        counts = _counts(strategy, rule_name, role, one, dtype, group)
        times = _counts(strategy, rule_name, role, one, dtype, shape[0] // group * group)
        even = [key for key in rest if counts[key] * (shape[0] // group) == times[key]]
        found |= {key: Form(group, counts[key], plain=False) for key in even}
        rest = [key for key in rest if key not in even]
        group = min(2 * group, shape[0])
    return found


def _counts(
    strategy: Strategy, rule_name: str, role: str, one: Shard, dtype: torch.dtype, rows: int
) -> dict[str, int]:
    """Entries along the first dimension that so many rows take."""
    state = fresh(strategy, rule_name, role, replace(one, chunk=rows), dtype, META)
    return {key: value.shape[0] if value.dim() else 0 for key, value in state.items()}


class Outside:
    """State as it stands in checkpoints.

    Args:
        strategy: of the optimizer.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._forms: dict[tuple[Any, ...], Forms] = {}

    def forms(self, place: Place, rule_name: str, p: Tensor) -> Forms:
        """Those of a parameter's state."""
        key = (rule_name, place.role, tuple(p.shape), p.dtype)
        if key not in self._forms:
            self._forms[key] = forms(self.strategy, *key)
        return self._forms[key]

    def out(self, place: Place, rule_name: str, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's state, for a checkpoint."""
        shard, known = place.shard, self.forms(place, rule_name, p)
        by_rows = shard is not None and self.strategy.way(rule_name, place.role, shard) != "whole"
        found: dict[str, Any] = {}
        for key, value in state.items():
            if key not in known:
                found[key] = value.contiguous() if shard and isinstance(value, Tensor) else value
                continue
            rows = shard.rows if shard and by_rows else p.shape[0]
            found[key] = known[key].out(value, rows)
            if by_rows:
                found[key] = placed(found[key], -(-p.shape[0] // known[key].group), p)
        return found

    def back(
        self, place: Place, rule_name: str, p: Tensor, given: Mapping[str, Any], needed: State
    ) -> dict[str, Any]:
        """What a checkpoint has of a parameter's state, as it is held here; misfits as they are."""
        shard, known = place.shard, self.forms(place, rule_name, p)
        by_rows = shard is not None and self.strategy.way(rule_name, place.role, shard) != "whole"
        found: dict[str, Any] = {}
        for key, value in given.items():
            if isinstance(value, Tensor):
                whole = not hasattr(value, "device_mesh")
                value = local(value)
                if key in known and key in needed and value.dim() > 1 - known[key].plain:
                    if shard and by_rows and whole:
                        value = _cut(value, known[key], shard)
                    value = known[key].back(value, needed[key])
            found[key] = value
        return found


def placed(own: Tensor, count: int, like: Any) -> Any:
    """Rows here, of so many on all ranks, placed as a parameter is."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((count, *own.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def _cut(value: Tensor, form: Form, shard: Shard) -> Tensor:
    """The rows of this rank, of a tensor that was saved whole."""
    first, last = (-(-row // form.group) for row in (shard.first, shard.first + shard.rows))
    return value[first:last]
