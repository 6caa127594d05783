"""A strategy: which rule each tensor of a model follows, and where gradients come from.

A strategy is frozen and plain: what a configuration names, a checkpoint records
and the planner counts. Settings that decide the shape of a buffer live in it;
what a scheduler changes (lr, betas, weight decay) lives in the optimizer's
parameter groups.

Tensors have roles (`roles`): matrix, embedding, head, vector. A strategy has a rule
"matrix" and a rule "other" for every role that it has no rule of that name for. It may
have two more: "small" for tensors that are too small to be worth a codec, "inactive"
for tensors that a schedule has put aside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowmem.optim import stacks
from lowmem.optim.contract import AnyRule, is_pointwise
from lowmem.optim.roles import is_stack, refined
from lowmem.optim.schedules import Always, Schedule
from lowmem.optim.source import Source
from lowmem.optim.state import Constants, State, prefixed
from lowmem.optim.writers import select

SMALL = 4096
"""Tensors with fewer elements take the "small" rule where there is one."""

Plain = bool | int | float | str


@dataclass(frozen=True)
class Strategy:
    """The rules by name, the source of gradients, the writer and the schedule.

    Args:
        name: registered name; options: the factory's arguments, plain values.
        rules: name to rule; has "matrix" and "other", may have embedding, head, vector, small, inactive.
        source: where gradients come from.
        writer: auto, nearest, stochastic, kahan or split.
        schedule: which tensors are active now.
    """

    rules: Mapping[str, AnyRule]
    source: Source
    name: str = ""
    options: Mapping[str, Plain] = field(default_factory=dict)
    writer: str = "auto"
    schedule: Schedule = field(default_factory=Always)

    def to_config(self) -> dict[str, Any]:
        """Name and options, as `create` takes them."""
        return {"name": self.name, "options": dict(self.options), "writer": self.writer}

    def rule_name(self, role: str, shape: Sequence[int]) -> str:
        """The name of the rule that a tensor of this role and shape follows.

        A tensor below SMALL elements follows "small" where there is such a rule, unless its role has
        a rule of its own, or is a matrix that is projected: what is held of it is smaller still.
        """
        role = refined(role, shape)
        if role == "convolution":
            role = "matrix"
        name = role if role in self.rules else "other"
        shrinks = name in ("matrix", "other") and is_pointwise(self.rules[name])
        return "small" if shrinks and "small" in self.rules and math.prod(shape) < SMALL else name

    def rules_at(self, ordinary: Mapping[str, str], step: int, seed: int) -> dict[str, str]:
        """The names of the rules that tensors follow after so many completed steps.

        Args:
            ordinary: tensor to `rule_name`, of all tensors.
            step: completed steps; seed: of the run.
        """
        names = {rule: tuple(n for n, r in ordinary.items() if r == rule) for rule in set(ordinary.values())}
        switched = self.schedule.role
        return {name: switched(name, rule, names[rule], step, seed) for name, rule in ordinary.items()}

    def slices(self, rule_name: str, role: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is a stack of matrices that are stepped one by one."""
        return is_stack(role, shape) and not is_pointwise(self.rules[rule_name])

    def constants(self, rule_name: str, shape: Sequence[int], role: str = "matrix") -> Constants:
        """What steps of a weight of this shape and role read and never change."""
        one = shape[1:] if self.slices(rule_name, role, shape) else shape
        return self.rules[rule_name].constants(tuple(one))

    def init(self, rule_name: str, x: Tensor, role: str = "matrix") -> State:
        """Fresh state of a weight like x of this role that follows this rule: the rule's and the writer's."""
        rule = self.rules[rule_name]
        state = stacks.init(rule, x) if self.slices(rule_name, role, x.shape) else rule.init(x)
        return state | prefixed("writer", select(self.writer, x.dtype).init(x))
