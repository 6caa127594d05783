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

from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, Rule, is_pointwise
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.hyper import Hyper
from lowmem.optim.state import Held, State, scoped
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors import stacks
from lowmem.optim.tensors.roles import from_text, refined
from lowmem.optim.writers import Writer, select


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Args:
        group: its parameter group; name: its name.
        role: what it is; rule: the name of the rule that it follows unless a schedule says otherwise.
        heads: into which its rows are cut, where it makes queries or keys; 0 elsewhere.
    """

    group: dict[str, Any]
    name: str
    role: str
    rule: str
    heads: int = 0

    def numbers(self) -> dict[str, Any]:
        """What `Hyper` takes from here, numbers as plain ones: a scheduler may have put a tensor there."""
        group = self.group
        whole = {key: int(group[key]) for key in ("step", "seed")}
        real = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        beta1, beta2 = group["betas"]
        told = {"betas": (float(beta1), float(beta2)), "heads": self.heads, "group": group}
        return {**whole, **real, **told}


def names_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """The names of each group's parameters; those without are numbered over all groups."""
    count = 0
    for group in groups:
        size = len(group["params"])
        yield group.get("param_names") or [f"param.{count + i}" for i in range(size)]
        count += size


class Roster:
    """All parameters of some groups, in order.

    Args:
        groups: parameter groups; strategy: whose rules they follow.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], strategy: Strategy) -> None:
        self.schedule = strategy.schedule
        self.places: dict[Tensor, Place] = {}
        self._since: dict[str, list[tuple[int, str]]] = {}
        for group, names in zip(groups, names_of(groups), strict=True):
            roles, heads = from_text(group["roles"]), from_text(group["heads"])
            for name, p in zip(names, group["params"], strict=True):
                role = refined(roles.get(name, group["role"]), p.shape)
                rule = strategy.rule_name(role, p.shape)
                self.places[p] = Place(group, name, role, rule, int(heads.get(name, 0)))
                self._since.setdefault(rule, []).append((group["since"], name))
        self._names: dict[tuple[str, int], tuple[str, ...]] = {}

    def __getitem__(self, p: Tensor) -> Place:
        if p not in self.places:
            raise UserError(
                f"a tensor of shape {tuple(p.shape)} is in no group of this optimizer; add it first"
            )
        return self.places[p]

    def rule_at(self, p: Tensor, step: int) -> str:
        """The name of the rule that a parameter follows after so many completed steps."""
        place, group = self[p], self[p].group
        names = self._taking_part(place.rule, step)
        return self.schedule.role(place.name, place.rule, names, step, group["seed"], group["decided"])

    def restarting(self, step: int) -> Iterator[Tensor]:
        """The parameters whose state is made anew where rules may change at this step."""
        for p, place in self.places.items():
            changed = self.rule_at(p, step) != self.rule_at(p, max(0, step - 1))
            if changed or self.schedule.restarts(place.name, place.rule):
                yield p

    def _taking_part(self, rule: str, step: int) -> tuple[str, ...]:
        """The tensors of a rule that a schedule divides: those that join do so when roles next change."""
        if (rule, step) not in self._names:
            began = self.schedule.began(step)
            self._names[rule, step] = tuple(name for since, name in self._since[rule] if since <= began)
        return self._names[rule, step]


@dataclass(frozen=True)
class Seat:
    """What the step of one parameter needs and does not change.

    Args:
        rule_name: of the rule it follows now; held: all of its state tensors, by key.
        parts: what is stepped, one after the other: the parameter, or each matrix of a stack.
    """

    rule_name: str
    held: Mapping[str, Tensor]
    parts: tuple[Part, ...]

    def fits(self, rule_name: str, held: Mapping[str, Tensor]) -> bool:
        """Whether rule and state tensors are still those it was made of."""
        same = rule_name == self.rule_name and held.keys() == self.held.keys()
        return same and all(held[key] is tensor for key, tensor in self.held.items())


@dataclass(frozen=True)
class Part:
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

    def step_(self, chunks: Chunks, p: Tensor, g: Blocks, hp: Hyper) -> None:
        """Take its step of a whole parameter's: update the state, write the weight."""
        weight = self.of(p)
        if self.index is not None:
            g = stacks.gradient(g, tuple(p.shape), self.index)
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
    rule, writer = strategy.rules[rule_name], select(strategy.writer, p.dtype)
    beside = ("writer.", "source.", "schedule.")
    own = {key: tensor for key, tensor in held.items() if not key.startswith(beside)}
    extra = scoped(held, "writer")
    if not strategy.slices(rule_name, place.role, p.shape):
        whole = Part(place.name, None, rule, writer, Held(own | constants), extra)
        return Seat(rule_name, dict(held), (whole,))
    parts = (
        Part(
            f"{place.name}.{i}", i, rule, writer,
            Held(stacks.state(own, i) | constants), stacks.flat(extra, i, len(p)),
        )
        for i in range(len(p))
    )  # fmt: skip
    return Seat(rule_name, dict(held), tuple(parts))
