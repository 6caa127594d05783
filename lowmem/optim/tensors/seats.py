"""Who is in an optimizer: the group, name, role and rule of each parameter, and what its step needs.

A `Roster` is read off the parameter groups as they are now, and thrown away when they
may have changed. A `Seat` is what does not change from step to step: rule, writer, and
views of the state; it holds as long as the state's tensors are those it was made of, so
that clearing, moving or replacing them from outside counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, Rule, is_pointwise
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.int8.tensor import Int8Weight, is_coded
from lowmem.optim.shards import Like, Shard, local, refuse_flattened, shard_of
from lowmem.optim.strategy import Strategy, Way
from lowmem.optim.tensors import stacks
from lowmem.optim.tensors.marks import has_turns
from lowmem.optim.tensors.roles import from_text, refined
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Held, State, scoped
from lowmem.optim.writers import Writer, select

KEPT = 64
"""Lists of names that a roster keeps."""


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Args:
        group: its parameter group; name: its name.
        role: what it is; rule: the name of the rule that it follows unless a schedule says otherwise.
        heads: into which its rows are cut, where it makes queries or keys; 0 elsewhere.
        shard: which of its rows are here, where they are spread over ranks.
    """

    group: dict[str, Any]
    name: str
    role: str
    rule: str
    heads: int = 0
    shard: Shard | None = None

    def judged(self, strategy: Strategy, rule_name: str) -> bool:
        """Whether ranks must agree on its step."""
        return self.shard is not None and strategy.judges(rule_name, self.role, self.shard)

    def fresh(self, strategy: Strategy, rule_name: str, p: Tensor, device: str = "") -> State:
        """Fresh state of a parameter here, beside it unless a device is named."""
        where = torch.device(device) if device else p.device
        if self.shard is None:
            own = local(p.detach())
            return strategy.init(rule_name, _like(own, where) if device else own, self.role)
        return fresh(strategy, rule_name, self.role, self.shard, p.dtype, where)


def _like(own: Tensor, device: torch.device) -> Tensor:
    """A weight such as this one elsewhere: codes stay codes, which writers go by."""
    if is_coded(own):
        return Int8Weight.empty(tuple(own.shape), own.dtype, device)
    return torch.empty_like(own, device=device)


def fresh(
    strategy: Strategy, rule_name: str, role: str, shard: Shard, dtype: torch.dtype, device: torch.device
) -> State:
    """Fresh state of a tensor whose rows are spread, as this rank holds it."""
    way = strategy.way(rule_name, role, shard)
    if way == "rows":
        return strategy.init(rule_name, cast("Tensor", Like(shard.shape, dtype, device)), role)
    shape = shard.full if way == "whole" else tuple(shard.shape)
    return strategy.init(rule_name, torch.empty((), dtype=dtype, device=device).expand(shape), role)


def names_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """The names of each group's parameters; those without are numbered over all groups."""
    count = 0
    for group in groups:
        size = len(group["params"])
        yield group.get("param_names") or [f"param.{count + i}" for i in range(size)]
        count += size


def _read(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a roster is made of; tensors stand for themselves as long as it holds them."""
    keys = ("role", "roles", "heads", "since")
    return [
        (id(group), *map(id, group["params"]), *(group.get("param_names") or ()), *(group[k] for k in keys))
        for group in groups
    ]


class Roster:
    """All parameters of some groups, in order.

    Args:
        groups: parameter groups; strategy: whose rules they follow.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], strategy: Strategy) -> None:
        self.schedule = strategy.schedule
        self.places: dict[Tensor, Place] = {}
        self._since: dict[str | bool, list[tuple[int, str, Tensor]]] = {}
        for group, names in zip(groups, names_of(groups), strict=True):
            roles, heads = from_text(group["roles"]), from_text(group["heads"])
            for name, p in zip(names, group["params"], strict=True):
                role = refined(roles.get(name, group["role"]), p.shape)
                refuse_flattened(p)
                shard = shard_of(p)
                rule = strategy.rule_name(role, p.shape, shard)
                self.places[p] = Place(group, name, role, rule, int(heads.get(name, 0)), shard)
                self._since.setdefault(self._divided(rule), []).append((group["since"], name, p))
        self.spread = any(hasattr(p, "device_mesh") for p in self.places)
        self._names: dict[tuple[str | bool, int], tuple[str, ...]] = {}
        self._read = _read(groups)

    def still(self, groups: Sequence[dict[str, Any]]) -> Roster | None:
        """Itself, unless the caller has changed the groups."""
        return self if self._read == _read(groups) else None

    def __getitem__(self, p: Tensor) -> Place:
        found = self.places.get(p)
        if found is None:
            raise UserError(
                f"a tensor of shape {tuple(p.shape)} is in no group of this optimizer; add it first"
            )
        return found

    def rule_at(self, p: Tensor, step: int) -> str:
        """The name of the rule that a parameter follows after so many completed steps."""
        return self.rule_of(self[p], step)

    def rule_of(self, place: Place, step: int) -> str:
        """The same of a place."""
        if self.schedule.steady:
            return place.rule
        group = place.group
        names = self._taking_part(place.rule, step)
        return self.schedule.role(place.name, place.rule, names, step, group["seed"], group["decided"])

    def restarting(self, step: int) -> Iterator[Tensor]:
        """The parameters whose state is made anew where rules may change at this step."""
        for p, place in self.places.items():
            changed = self.rule_at(p, step) != self.rule_at(p, max(0, step - 1))
            if changed or self.schedule.restarts(place.name, place.rule):
                yield p

    def _taking_part(self, rule: str, step: int) -> tuple[str, ...]:
        """The tensors that a schedule divides with a rule's: those that join do so when roles next change."""
        key = self._divided(rule), self.schedule.began(step)
        if key not in self._names:
            if len(self._names) >= KEPT:  # a roster lives as long as the groups stay what they are
                self._names.clear()
            self._names[key] = tuple(
                name for since, name, p in self._since[key[0]] if since <= key[1] and has_turns(p)
            )
        return self._names[key]

    def _divided(self, rule: str) -> str | bool:
        """With which tensors those of a rule are divided: with each other, or all by their layers."""
        return self.schedule.by_layer or rule


@dataclass(frozen=True)
class Seat:
    """What the step of one parameter needs and does not change.

    Args:
        rule_name: of the rule it follows now; held: all of its state tensors, by key.
        parts: what is stepped, one after the other: the parameter, or each matrix of a stack.
        shard: which of its rows are here, where they are spread; way: how they are stepped then.
        idle: nothing is done.
    """

    rule_name: str
    held: Mapping[str, Tensor]
    parts: tuple[Piece, ...]
    shard: Shard | None = None
    way: Way = "rows"
    idle: bool = False

    @property
    def joint(self) -> bool:
        """Whether ranks must agree on the step."""
        return self.shard is not None and self.way == "rows" and not is_pointwise(self.parts[0].rule)

    def fits(self, rule_name: str, held: Mapping[str, Tensor]) -> bool:
        """Whether rule and state tensors are still those it was made of."""
        same = rule_name == self.rule_name and held.keys() == self.held.keys()
        return same and all(held[key] is tensor for key, tensor in self.held.items())


@dataclass(frozen=True)
class Piece:
    """A tensor that a rule steps as one.

    Args:
        name: of its random streams and refreshes; index: of the matrix in a stack, None for all of it.
        rule: what is done; writer: of weights of this dtype.
        state: the rule's state and constants; extra: the writer's state.
    """

    name: str
    index: int | None
    rule: AnyRule
    writer: Writer
    state: State
    extra: State

    def of(self, p: Tensor) -> Tensor:
        """A view of what is stepped of a parameter."""
        return p if self.index is None else p[self.index]

    def seen(self, p: Tensor, g: Blocks) -> Blocks:
        """The gradient of what is stepped, of a whole parameter's."""
        return g if self.index is None else stacks.gradient(g, tuple(p.shape), self.index)

    def step_(self, chunks: Chunks, p: Tensor, g: Blocks, hp: Hyper, prepared: bool = False) -> None:
        """Take its step of a whole parameter's: update the state, write the weight."""
        weight, g = self.of(p), self.seen(p, g)
        if not prepared:
            self.rule.prepare(g, self.state, hp)
        if is_pointwise(self.rule):
            chunks.apply_(self.rule, self.writer, weight, g, self.state, self.extra, hp)
            return
        direction = cast("Rule", self.rule).update(g, self.state, hp)
        chunks.write_(self.writer, weight, direction, self.extra, hp)
        if direction.commit:
            direction.commit()


def seat(
    strategy: Strategy, place: Place, rule_name: str, p: Tensor, held: Mapping[str, Tensor], constants: State
) -> Seat:
    """The seat of a parameter with this state."""
    rule, writer = strategy.rules[rule_name], select(strategy.writer, p.dtype, is_coded(p))
    beside = ("writer.", "source.", "schedule.")
    own = {key: tensor for key, tensor in held.items() if not key.startswith(beside)}
    extra = scoped(held, "writer")
    shard = place.shard
    way: Way = strategy.way(rule_name, place.role, shard) if shard else "rows"
    if not strategy.slices(rule_name, place.role, p.shape):
        whole = Piece(place.name, None, rule, writer, Held(own | constants), extra)
        return Seat(rule_name, dict(held), (whole,), shard, way, rule.idle)
    first, count = (shard.first, shard.rows) if shard else (0, len(p))
    parts = (
        Piece(
            f"{place.name}.{first + i}", i, rule, writer,
            Held(stacks.state(own, i) | constants), stacks.flat(extra, i, count),
        )
        for i in range(count)
    )  # fmt: skip
    return Seat(rule_name, dict(held), tuple(parts), shard, way, rule.idle)
