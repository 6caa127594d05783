"""What ranks exchange in a step of one weight whose rows they share, counted on the meta device.

The step that is counted is the optimizer's own, of the first rank, with a `Shard` that notes what
would be summed or gathered and sends nothing. So a table of methods and a plan of a cluster's
traffic cannot drift from what a run does. The engine's own exchanges, of weights and gradients in
forward and backward, are the same for every method and are not among these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.memory.count import between
from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.schedules.schedule import Always
from lowmem.optim.shards import Shard, matrix
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.seats import Piece, Place, fresh, seat
from lowmem.optim.tensors.steps import Step
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class Noting(Shard):
    """Rows whose sums and gathered tensors are noted; `group` is the list of their bytes."""

    def total(self, x: Tensor, op: str = "sum") -> Tensor:
        """Note what would be summed."""
        self.group.append(x.nbytes)
        return x

    def gathered(self, own: Tensor) -> Tensor:
        """Note what would be received of all ranks."""
        self.group.append(self.ranks * self.chunk * own[:1].numel() * own.element_size())
        return own.new_empty(self.full[0], *own.shape[1:])


def exchanged(
    strategy: Strategy,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    role: str = "matrix",
    *,
    ranks: int = 2,
    refresh: bool = False,
) -> list[int]:
    """Bytes of each sum and each gathered tensor of a step of one weight, in order; all ranks have the same.

    Args:
        strategy: from `create`; shape, dtype, role: of the weight.
        ranks: that share its rows.
        refresh: at the first step, where a basis is found; False for an ordinary step.

    Raises:
        UserError: a strategy that does not step sharded weights.

    Example:
        >>> from lowmem import create
        >>> exchanged(create("adamw"), (64, 32)), exchanged(create("adafactor"), (64, 32))
        ([], [128, 4, 4, 4])
    """
    strategy = replace(strategy.sided(spread=True), schedule=Always())
    if any(rule.joint for rule in strategy.rules.values()):
        raise UserError(f"{strategy.name} sums over all tensors, which does not work for sharded ones yet")
    noted: list[int] = []
    shard = Noting(tuple(shape), -(-shape[0] // ranks), ranks, 0, noted)
    rule_name = strategy.rule_name(role, shape, shard)
    p = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    optimizer = LowMemOptimizer([{"params": [("w", p)], "role": role}], strategy, compile="off")
    group = optimizer.param_groups[0]
    group["step"] = 0 if refresh else between(strategy.rules[rule_name].period)
    held = fresh(strategy, rule_name, role, shard, dtype, p.device)
    place = Place(group, "w", role, rule_name, 0, shard)
    taken = seat(strategy, place, rule_name, p, held, optimizer.constants(p))
    rows = torch.empty(tuple(shard.shape), dtype=dtype, device="meta")
    weight, g = rows, Dense(rows, None, matrix(shard) if taken.way == "rows" else None)
    if taken.way == "whole":
        weight, g = shard.gathered(rows), Dense(shard.gathered(rows))

    def hypers(part: Piece, weight: Blocks, own: Shard | None) -> Hyper:
        return optimizer.hyper(p, part, refresh, weight, own)

    with torch.no_grad():
        Step(taken, rows, weight, g, hypers).finish(optimizer.chunks)
    return noted
