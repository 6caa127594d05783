"""A strategy: which rule each tensor of a model follows, and where gradients come from.

A strategy is frozen and plain: what a configuration names, a checkpoint records
and the planner counts. Settings that decide the shape of a buffer live in it;
what a scheduler changes (lr, betas, weight decay) lives in the optimizer's
parameter groups.

Tensors have roles. "matrix" is a hidden weight with two dimensions or more;
"other" is everything else: embeddings, the head, norms, biases. A strategy may
have more roles: "small" for tensors that are too small to be worth a codec,
"inactive" for tensors that a schedule has put aside.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.optim.contract import AnyRule, State, is_pointwise, prefixed
from lowmem.optim.schedules import Always, Schedule
from lowmem.optim.source import Source
from lowmem.optim.writers import select

SMALL = 4096
"""Tensors with fewer elements take the "small" rule where there is one."""

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
"""Last component of a module's name that marks an output head in models that do not say so."""

Plain = bool | int | float | str


@dataclass(frozen=True)
class Strategy:
    """The rules by role, the source of gradients, the writer and the schedule.

    Args:
        name: registered name; options: the factory's arguments, plain values.
        rules: role to rule; has "matrix" and "other".
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

    def refine(self, role: str, shape: torch.Size | tuple[int, ...]) -> str:
        """The role a tensor of this shape really has.

        A "matrix" needs two dimensions. A tensor below SMALL elements is "small"
        where the strategy has a rule for that, unless it is a matrix that is
        projected: what is held of it is smaller still.
        """
        if role == "matrix" and len(shape) < 2:
            role = "other"
        if role not in ("matrix", "other") or "small" not in self.rules or math.prod(shape) >= SMALL:
            return role
        return "small" if is_pointwise(self.rules[role]) else role

    def init(self, role: str, x: Tensor) -> State:
        """Fresh state of a weight like x with this (refined) role: the rule's and the writer's."""
        return self.rules[role].init(x) | prefixed("writer", select(self.writer, x.dtype).init(x))

    def role(self, name: str, p: Tensor, outside: Collection[str] = ()) -> str:
        """The role of a parameter; `outside` names the embeddings and heads."""
        return self.refine("other" if name in outside else "matrix", p.shape)

    def param_groups(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.0,
        decay_names: Collection[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups with roles, in the order of the model.

        Args:
            model: its trainable parameters are taken, tied ones once.
            weight_decay: of the decaying group.
            decay_names: names that decay; all, if None.

        Returns:
            Groups with "params" as (name, parameter) pairs, "role" and "weight_decay".
        """
        outside = outside_names(model)
        groups: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, p in self.source.trained(model):
            decays = decay_names is None or name in decay_names
            groups.setdefault((self.role(name, p, outside), decays), []).append((name, p))
        return [
            {"params": members, "role": role, "weight_decay": weight_decay if decays else 0.0}
            for (role, decays), members in groups.items()
        ]


def outside_names(model: nn.Module) -> set[str]:
    """Names of the parameters of embeddings and output heads, under every name they have."""
    heads = {id(module) for module in (_head(model),) if module is not None}
    found: set[int] = set()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) or id(module) in heads or last in HEADS:
            found |= {id(p) for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in found}


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
