"""Which tensors are active when: what a schedule does to the step that is traced.

Of the windows of a schedule, the one whose backward pass reaches furthest is traced: gradients exist for
its tensors alone, and layers above the first of them still pass gradients on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lowmem.optim.schedules.schedule import Always
from lowmem.optim.shards import Shard
from lowmem.optim.strategy import Strategy

MOST = 64
"""Windows that are looked at."""
FAR = 20_000
"""Steps among which they are looked for."""


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter as the optimizer will meet it.

    Args:
        role: of `optim.tensors.roles`.
        shard: the rows of it that are held where ranks share them.
        coded: held as int8 codes; dtype is then that of its gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    shard: Shard | None = None
    coded: bool = False

    @property
    def elements(self) -> int:
        """Numbers of the whole tensor."""
        return math.prod(self.shape)


def special(strategy: Strategy) -> Strategy | None:
    """The strategy, where a step is not a forward and a backward pass with a gradient for every tensor."""
    return strategy if strategy.turns or not strategy.source.needs_autograd else None


def windows(strategy: Strategy, parameters: Sequence[Parameter]) -> Sequence[Mapping[str, str]]:
    """The rule of each parameter by name, for every window of the schedule that may differ."""
    return _windows(strategy, tuple(parameters))


@functools.lru_cache(maxsize=256)
def _windows(strategy: Strategy, parameters: tuple[Parameter, ...]) -> Sequence[Mapping[str, str]]:
    ordinary = {p.name: strategy.rule_name(p.role, p.shape, p.shard) for p in parameters}
    later = () if isinstance(strategy.schedule, Always) else range(1, FAR)
    steps = [0, *itertools.islice(filter(strategy.schedule.switches, later), MOST - 1)]
    found = [strategy.rules_at(ordinary, step, 0) for step in steps]
    return list({tuple(rules.values()): rules for rules in found}.values())


def resting(strategy: Strategy | None, parameters: Sequence[Parameter]) -> frozenset[str]:
    """Names of the parameters that no gradient is made for, while the first that can be is active."""
    if strategy is None or not strategy.turns:
        return frozenset()
    found = [
        tuple(i for i, p in enumerate(parameters) if not strategy.rules[rules[p.name]].idle)
        for rules in windows(strategy, parameters)
    ]
    active = min(found)
    return frozenset(p.name for i, p in enumerate(parameters) if i not in active)
