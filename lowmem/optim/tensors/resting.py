"""What a schedule means for the tensors of an optimizer: who rests, and what it is shown and asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.contract import AnyRule
from lowmem.optim.formulas import ByBlocks
from lowmem.optim.schedules.schedule import Schedule
from lowmem.optim.shards import Shard, matrix, shard_in
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.marks import carry_, drop_, has_turns, rest_, wake_
from lowmem.optim.tensors.seats import Roster, Seat
from lowmem.optim.terms.state import State, scoped


def arrange_(roster: Roster, rules: Mapping[str, AnyRule], owner: nn.Module | None = None) -> None:
    """Put aside what takes no step now, and take up all else, whoever has put it aside.

    Args:
        roster: all parameters; rules: by name, of which some may be idle.
        owner: a model whose copies are to know who rests.
    """
    idle = {name for name, rule in rules.items() if rule.idle}
    if idle and owner is not None:
        carry_(owner)
    for p, place in roster.places.items():
        resting = idle and roster.rule_at(p, place.group["step"]) in idle
        (rest_ if resting else wake_)(p)


def wake_all_(roster: Roster, owner: nn.Module | None = None) -> None:
    """Let all that was put aside require gradients again: at the end of a run."""
    if owner is not None:
        drop_(owner)
    for p in roster.places:
        wake_(p)


class Look(NamedTuple):
    """What a schedule saw of the rows here of a gradient: the other ranks' part of it is missing."""

    state: State
    part: Tensor
    shape: Any
    shard: Shard


def observe_(schedule: Schedule, seat: Seat, g: Blocks, passes: ByBlocks) -> list[Look]:
    """Show a gradient to a schedule that holds something of the tensor.

    Returns:
        What it waits for where rows are spread: `together_`, once for all tensors of a step.
    """
    if not schedule.observes or "schedule.seen" not in seat.held:
        return []
    if seat.shard and seat.way == "stack" and isinstance(g, Dense):  # one tensor to a schedule
        g = Dense(g.tensor, g.factor, matrix(seat.shard))
    state, part, shard = scoped(seat.held, "schedule"), schedule.part(g, passes), shard_in(g.shape)
    if shard:
        return [Look(state, part, g.shape, shard)]
    schedule.observe_(state, part, g.shape)
    return []


def together_(schedule: Schedule, looks: list[Look]) -> None:
    """Sum up what the ranks saw, in one exchange for each process group; then nothing waits."""
    groups: dict[int, list[Look]] = {}
    for look in looks:
        groups.setdefault(id(look.shard.group), []).append(look)
    for members in groups.values():
        sums = members[0].shard.total(torch.stack([look.part for look in members]))
        for look, part in zip(members, sums, strict=True):
            schedule.observe_(look.state, part, look.shape)
    looks.clear()


def turn_(strategy: Strategy, roster: Roster, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Once a step is taken: where roles change now, decide whose turn it is, and let the others rest.

    Args:
        strategy: whose schedule decides; roster: all parameters; state: of the optimizer.
    """
    step = max((place.group["step"] for place in roster.places.values()), default=0)
    if strategy.schedule.switches(step):
        if strategy.schedule.observes:
            _decide_(strategy.schedule, roster, state)
        arrange_(roster, strategy.rules)


def _decide_(schedule: Schedule, roster: Roster, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """By what was seen, which is read from the devices, once each; then look anew."""
    watched = {p: state[p]["schedule.seen"] for p in roster.places if "schedule.seen" in state.get(p, {})}
    seen: dict[str, float] = {}
    for device in {x.device for x in watched.values()}:
        here = [p for p in watched if p.device == device]
        sums = torch.stack([watched[p] for p in here]).tolist()
        seen |= {roster[p].name: total / n for p, (total, n) in zip(here, sums, strict=True) if n}
    group = next(iter(roster.places.values())).group
    names = [place.name for p, place in roster.places.items() if place.rule == "matrix" and has_turns(p)]
    decided = schedule.decide(group["decided"], seen, names, group["step"], group["seed"])
    for place in roster.places.values():
        place.group["decided"] = decided
    for x in watched.values():
        x.zero_()
