"""What a step of one tensor works on, be the tensor here, in part, or in copies.

    begin    weight and gradient as the parts of a seat step them; what is rare, such as a refresh
    agree    all ranks say of all begun tensors at once whether a gradient forbids the step
    finish   update the state, write the weight

An ordinary tensor goes through all of it at once. Where rows are spread, a rule that judges
its tensor as a whole must hear of the other ranks before anything moves: `agree` sums up one
number for each such tensor, in one exchange for each process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Dense, Projected, Slice
from lowmem.optim.contract import Rule
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.shards import Shard, local, matrix
from lowmem.optim.tensors.seats import Piece, Place, Seat
from lowmem.optim.terms.hyper import Hyper, Lookup
from lowmem.optim.terms.overall import Overall

Hypers = Callable[[Piece, Blocks, Shard | None], Hyper]
"""What the rule of a part may know of its step, by the weight and the rows of it that are here."""


@dataclass
class Step:
    """The step of one tensor.

    Args:
        seat: rule, writer and state; own: the weight, or the rows of it that are here.
        weight: what is stepped, a copy of all rows where the seat's way is "whole"; g: its gradient.
        hypers: what its rules may know.
        prepared: whether what is rare is done; unsound: what its parts say of the gradient, where asked.
        sound: 0-D bool, of each part, where all ranks have agreed.
    """

    seat: Seat
    own: Tensor
    weight: Tensor
    g: Blocks
    hypers: Hypers
    prepared: bool = False
    unsound: list[Tensor] = field(default_factory=list)
    sound: Tensor | None = None

    def hyper(self, part: Piece) -> Hyper:
        """What the rule of a part may know."""
        shard = self.seat.shard if self.seat.way == "rows" else None
        rows = matrix(shard).shard if shard else None
        weight = Dense(part.of(self.weight), shape=rows.shape if rows else None)
        hp = self.hypers(part, weight, rows)
        hp.sound = self.sound
        return hp

    def prepare(self) -> None:
        """Do what is rare, and look at the gradient where other ranks must hear of it."""
        (part,) = self.seat.parts
        hp = self.hyper(part)
        part.rule.prepare(self.g, part.state, hp)
        found = cast("Rule", part.rule).unsound(self.g, part.state, hp)
        self.unsound = [] if found is None else [found]
        self.prepared = True

    def finish(self, chunks: Chunks) -> None:
        """Take it."""
        if self.seat.idle:
            return
        if self.seat.joint and not self.prepared:
            self.prepare()
            agree([self])
        if self.seat.way == "whole" and self.seat.shard and self.seat.shard.rank:
            chunks = chunks.aside  # all ranks take this step, and one counts what it leaves out
        for part in self.seat.parts:
            part.step_(chunks, self.weight, self.g, self.hyper(part), prepared=self.prepared)
        if self.seat.shard and self.seat.way == "whole":
            self.own.copy_(self.seat.shard.own(self.weight))


def hyper(
    place: Place, name: str, weight: Blocks, chunks: Chunks, constant: Lookup,
    first: bool, shard: Shard | None, overall: Overall | None = None,
) -> Hyper:  # fmt: skip
    """What a rule may know of a step, from the parameter's place."""
    group = place.group
    beta1, beta2 = group["betas"]
    return Hyper(
        step=int(group["step"]),
        name=name,
        seed=int(group["seed"]),
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        weight=weight,
        advance=chunks.advance_,
        passes=chunks.passes,
        first=first,
        heads=place.heads,
        constant=constant,
        shard=shard,
        group=group,
        overall=overall,
    )


def begin(seat: Seat, p: Tensor, g: Blocks, hypers: Hypers) -> Step:
    """The step of a parameter by a gradient.

    Raises:
        UserError: a gradient that is not spread as its parameter is.
    """
    shard, own = seat.shard, local(p.detach())
    if seat.idle or not hasattr(p, "device_mesh"):
        return Step(seat, own, own, g, hypers)
    if isinstance(g, Dense):
        check_placed(p, g.tensor)
        here = local(g.tensor)
        if shard and seat.way == "whole":
            here = shard.gathered(here)
        g = Dense(here, g.factor, matrix(shard) if shard and seat.way == "rows" else None)
    elif shard is not None and seat.way != "whole" and not isinstance(g, Projected):
        g = Slice(g, shard.shape)
    weight = shard.gathered(own) if shard and seat.way == "whole" else own
    return Step(seat, own, weight, g, hypers)


def check_placed(p: Tensor, g: Tensor) -> None:
    """Refuse a gradient that does not lie where its parameter does."""
    placed, wanted = getattr(g, "placements", None), getattr(p, "placements", None)
    if placed != wanted:
        raise UserError(
            f"a gradient of shape {tuple(g.shape)} is placed as {placed}, its parameter as {wanted}; let "
            f"backward of the sharded model make it, or redistribute it"
        )


def agree(steps: Iterable[Step]) -> None:
    """Let the ranks say of all tensors at once which ones are not stepped."""
    groups: dict[int, list[Step]] = {}
    for step in steps:
        if step.unsound:
            groups.setdefault(id(_shard(step).group), []).append(step)
    for members in groups.values():
        flags = _shard(members[0]).total(torch.stack([step.unsound[0] for step in members]), "max")
        for step, flag in zip(members, flags, strict=True):
            step.sound = flag == 0.0


def agreed(steps: dict[Tensor, Step]) -> dict[Tensor, Step]:
    """Steps that are prepared, and of which all ranks have said what they find."""
    for step in steps.values():
        step.prepare()
    agree(steps.values())
    return steps


def _shard(step: Step) -> Shard:
    return cast("Shard", step.seat.shard)
