"""A strategy: which rule each tensor of a model follows, and where gradients come from.

A strategy is frozen and hashable: what a configuration names, a checkpoint records
and the planner counts, and its own key wherever something is remembered. Equal
strategies take equal steps, whatever they are called. Settings that decide the shape
of a buffer live in it; what a scheduler changes (lr, betas, weight decay) lives in the
optimizer's parameter groups.

Tensors have roles (`roles`): matrix, embedding, head, vector. A strategy has a rule
"matrix" and a rule "other" for every role that it has no rule of that name for. It may
have two more: "small" for tensors that are too small to be worth a codec, "inactive"
for tensors that a schedule has put aside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from lowmem.optim.contract import AnyRule, is_pointwise
from lowmem.optim.int8.tensor import is_coded
from lowmem.optim.schedules.schedule import Always, Schedule
from lowmem.optim.shards import Shard
from lowmem.optim.source import Source
from lowmem.optim.tensors import stacks
from lowmem.optim.tensors.roles import is_stack, refined
from lowmem.optim.terms.state import Constants, State, prefixed
from lowmem.optim.writers import Stochastic, Writer, select

SMALL = 4096
"""Tensors with fewer elements take the "small" rule where there is one."""

Plain = bool | int | float | str
Way = Literal["rows", "stack", "whole"]
"""How a tensor is stepped whose rows are spread over ranks; see `shards`."""


@dataclass(frozen=True)
class Strategy:
    """The rules by role, the source of gradients, the writer and the schedule.

    Args:
        rules: name to rule; has "matrix" and "other", may have embedding, head, vector, small, inactive.
        source: where gradients come from.
        writer: how new weights of 16 bits are stored.
        schedule: which tensors are active now.
        name: registered name, and options as `create` takes them; empty for one composed of parts, or
            changed by `dataclasses.replace`.

    Raises:
        TypeError: a part that is not hashable.
    """

    rules: Mapping[str, AnyRule]
    source: Source
    writer: Writer = field(default_factory=Stochastic)
    schedule: Schedule = field(default_factory=Always)
    name: str = field(default="", init=False, compare=False)
    options: Mapping[str, Plain] = field(default_factory=dict, init=False, compare=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        one: dict[AnyRule, AnyRule] = {}
        # kernels are made for a rule's identity: equal rules are one object
        rules = {role: one.setdefault(rule, rule) for role, rule in self.rules.items()}
        object.__setattr__(self, "rules", MappingProxyType(rules))
        parts = (frozenset(self.rules.items()), self.source, self.writer, self.schedule)
        object.__setattr__(self, "_hash", hash(parts))  # it is a key of many caches

    def __hash__(self) -> int:
        return self._hash

    @property
    def turns(self) -> bool:
        """Whether tensors rest for a time, without a gradient."""
        return any(rule.idle for rule in self.rules.values())

    @property
    def asks_loss(self) -> bool:
        """Whether a rule goes by the value of the loss."""
        return any(rule.needs_loss for rule in self.rules.values())

    @property
    def probes(self) -> int:
        """Steps between probes of the curvature; 0 for none."""
        return max(rule.probes for rule in self.rules.values())

    @property
    def waits(self) -> str:
        """Why no tensor may step before all gradients are there; "" where it may."""
        joint = any(rule.joint for rule in self.rules.values())
        why = "sums over all tensors before one steps" if joint else ""
        return why or ("probes the curvature by gradients that are no steps" if self.probes else "")

    @property
    def asks(self) -> str:
        """What is asked for beside gradients, in a word; "" for nothing."""
        return "the value of the loss" if self.asks_loss else "probes of the curvature" if self.probes else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (dict(self.rules), self.source, self.writer, self.schedule, self.to_config())

    def __str__(self) -> str:
        told = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({told})" if self.name else text_of(self)

    def called(self, name: str, options: Mapping[str, Plain]) -> Strategy:
        """The same strategy under a name, with the options that make it."""
        made = replace(self)
        object.__setattr__(made, "name", name)
        object.__setattr__(made, "options", MappingProxyType(dict(options)))
        return made

    def to_config(self) -> dict[str, Any]:
        """Name and options, as `create` takes them; the text of the parts where there is no name."""
        if self.name:
            return {"name": self.name, "options": dict(self.options)}
        return {"name": "", "options": {}, "parts": text_of(self)}

    @property
    def text(self) -> str:
        """What checkpoints record."""
        return json.dumps(self.to_config(), sort_keys=True)

    def sided(self, spread: bool) -> Strategy:
        """The strategy with `proj_type=auto` decided, in rules and options; itself where nothing is open.

        Args:
            spread: whether rows of weights lie on several ranks.
        """
        rules = {name: sided(rule, spread) for name, rule in self.rules.items()}
        if all(rule is self.rules[name] for name, rule in rules.items()):
            return self
        side = "right" if spread else "std"
        open_ = {key for key, value in self.options.items() if key.endswith("proj_type") and value == "auto"}
        return replace(self, rules=rules).called(self.name, {**self.options, **dict.fromkeys(open_, side)})

    def rule_name(self, role: str, shape: Sequence[int], shard: Shard | None = None) -> str:
        """The name of the rule that a tensor of this role and shape follows.

        A tensor below SMALL elements follows "small" where there is such a rule, unless its role has
        a rule of its own, or is a matrix that is projected: what is held of it is smaller still. So does
        a tensor whose shards do not start on a block of the ordinary rule.
        """
        role = refined(role, shape)
        if role == "convolution":
            role = "matrix"
        name = role if role in self.rules else "other"
        shrinks = name in ("matrix", "other") and is_pointwise(self.rules[name])
        if not shrinks or "small" not in self.rules:
            return name
        cut = shard is not None and self.way(name, role, shard) == "whole"
        return "small" if cut or math.prod(shape) < SMALL else name

    def rules_at(
        self, ordinary: Mapping[str, str], step: int, seed: int, decided: str = ""
    ) -> dict[str, str]:
        """The names of the rules that tensors follow after so many completed steps.

        Args:
            ordinary: tensor to `rule_name`, of all tensors that are trained.
            step: completed steps; seed: of the run; decided: by a schedule that goes by gradients.
        """
        divided = {name: self.schedule.by_layer or rule for name, rule in ordinary.items()}
        names = {key: tuple(n for n, k in divided.items() if k == key) for key in set(divided.values())}
        switched = self.schedule.role
        return {
            name: switched(name, rule, names[divided[name]], step, seed, decided)
            for name, rule in ordinary.items()
        }

    def way(self, rule_name: str, role: str, shard: Shard) -> Way:
        """How a tensor is stepped whose rows are spread; the same on all ranks."""
        if self.slices(rule_name, role, shard.full):
            return "stack"
        rule = self.rules[rule_name]
        cut = is_pointwise(rule) or len(shard.full) > 1  # a vector has no rows
        return "rows" if cut and rule.shards(shard.shape) else "whole"

    def judges(self, rule_name: str, role: str, shard: Shard) -> bool:
        """Whether ranks must agree on the step of a tensor whose rows are spread."""
        return not is_pointwise(self.rules[rule_name]) and self.way(rule_name, role, shard) == "rows"

    def slices(self, rule_name: str, role: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is a stack of matrices that are stepped one by one."""
        rule = self.rules[rule_name]
        return is_stack(role, shape) and (not is_pointwise(rule) or rule.measures)

    def constants(self, rule_name: str, shape: Sequence[int], role: str = "matrix") -> Constants:
        """What steps of a weight of this shape and role read and never change."""
        one = shape[1:] if self.slices(rule_name, role, shape) else shape
        return self.rules[rule_name].constants(tuple(one))

    def init(self, rule_name: str, x: Tensor, role: str = "matrix") -> State:
        """Fresh state of a weight like x under this rule: also the writer's, the source's, the schedule's."""
        rule = self.rules[rule_name]
        if rule.idle:
            return {}
        state = stacks.init(rule, x) if self.slices(rule_name, role, x.shape) else rule.init(x)
        beside = {"writer": select(self.writer, x.dtype, is_coded(x)).init(x), "source": self.source.init(x)}
        beside["schedule"] = self.schedule.init(rule_name, x)
        return state | {key: t for name, own in beside.items() for key, t in prefixed(name, own).items()}


def _restored(rules: Any, source: Any, writer: Any, schedule: Any, config: Mapping[str, Any]) -> Strategy:
    made = Strategy(rules, source, writer, schedule)
    return made.called(config["name"], config["options"])


def sided(part: Any, spread: bool) -> Any:
    """A frozen part with every basis in it `sided`; itself where nothing is open."""
    if hasattr(part, "sided"):
        return part.sided(spread)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    own = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
    new = {name: sided(value, spread) for name, value in own.items()}
    return replace(part, **new) if any(new[name] is not own[name] for name in own) else part


def text_of(value: Any) -> str:
    """A frozen part as text, the same in every process: what differs from its defaults.

    >>> text_of(Stochastic())
    'Stochastic()'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {text_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(text_of(one) for one in value) + ")"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    plain = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(value)}
    told = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
    inside = ", ".join(f"{k}={text_of(v)}" for k, v in told.items() if plain[k] != v)
    return f"{type(value).__qualname__}({inside})"
