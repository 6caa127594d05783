"""Tensors that a schedule has put aside, and that no gradient is made for.

What rests does not require a gradient: the backward pass makes none and stops where nothing below needs
one, and the forward pass keeps nothing for it. It is still trained, only not now. That is marked
on the tensor, so that everyone who asks what is trained, a second optimizer too, gets the whole answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule
from lowmem.optim.schedules import Schedule
from lowmem.optim.state import scoped
from lowmem.optim.tensors.seats import Roster, Seat

_MARK = "_lowmem_rests"


def trains(p: Tensor) -> bool:
    """Whether a parameter is trained, at this step or at another."""
    return p.requires_grad or rests(p)


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


def arrange_(roster: Roster, rules: Mapping[str, AnyRule]) -> None:
    """Put aside what takes no step now, and take up all else, whoever has put it aside.

    Args:
        roster: all parameters; rules: by name, of which some may be idle.
    """
    idle = {name for name, rule in rules.items() if rule.idle}
    for p, place in roster.places.items():
        resting = idle and roster.rule_at(p, place.group["step"]) in idle
        (rest_ if resting else wake_)(p)


def wake_all_(roster: Roster) -> None:
    """Let all that was put aside require gradients again: at the end of a run."""
    for p in roster.places:
        wake_(p)


def observe_(schedule: Schedule, seat: Seat, g: Blocks) -> None:
    """Show a gradient to a schedule, where it holds something of the tensor."""
    if schedule.observes and "schedule.seen" in seat.held:
        schedule.observe_(scoped(seat.held, "schedule"), g)


def decide_(schedule: Schedule, roster: Roster, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Let a schedule decide by what it has seen, and begin to look anew; reads from the devices, once each.

    Args:
        roster: all parameters; state: of the optimizer.
    """
    if not schedule.observes:
        return
    watched = {p: state[p]["schedule.seen"] for p in roster.places if "schedule.seen" in state.get(p, {})}
    seen: dict[str, float] = {}
    for device in {x.device for x in watched.values()}:
        here = [p for p in watched if p.device == device]
        sums = torch.stack([watched[p] for p in here]).tolist()
        seen |= {roster[p].name: total / n for p, (total, n) in zip(here, sums, strict=True) if n}
    group = next(iter(roster.places.values())).group
    names = [place.name for place in roster.places.values() if place.rule == "matrix"]
    decided = schedule.decide(group["decided"], seen, names, group["step"], group["seed"])
    for place in roster.places.values():
        place.group["decided"] = decided
    for x in watched.values():
        x.zero_()
