"""Copies of a model that exchange projected gradients instead of whole ones.

    R = mean over ranks of down(G)          r (m or n) numbers for a matrix, not m n

A subspace method that drops what it does not see steps by R alone, and down is linear: the mean of
the projections is the projection of the mean. So a hook of DistributedDataParallel sums R, and the
optimizer is handed that. A tensor whose basis is refreshed at this step is exchanged whole, as are
those that are not projected; which these are follows from names and clock, on all ranks alike.

DDP holds its buckets of whole gradients all the same: traffic is saved, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import Dense, Projected
from lowmem.optim.contract import Rule
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.release import projecting
from lowmem.optim.strategy import Strategy


@dataclass
class LowRankSync:
    """The hook of one model; make it with `low_rank_sync`.

    Args:
        optimizer: of every rank, over the model's parameters.

    Attributes:
        sent: bytes that each rank has given to be summed since the last `step()`; last: in the step before.
    """

    optimizer: LowMemOptimizer
    sent: int = 0
    last: int = 0
    _low: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket of gradients over the ranks, or what is seen of them."""
        import torch.distributed as dist

        pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        lows = {p: self._project(p, g) for p, g in pairs if projecting(self.optimizer, p)}
        whole = [g for p, g in pairs if p not in lows]
        parts = [list(lows.values()), whole]
        flats = [
            torch.cat([x.reshape(-1) for x in part]).div_(dist.get_world_size()) for part in parts if part
        ]
        self.sent += sum(flat.nbytes for flat in flats)
        works = [dist.all_reduce(flat, async_op=True).get_future() for flat in flats]

        def back(_: Any) -> Tensor:
            for part, flat in zip([part for part in parts if part], flats, strict=True):
                values = torch.split(flat, [x.numel() for x in part])
                for x, own in zip(part, values, strict=True):
                    x.copy_(own.view_as(x))
            self._low |= lows
            gradients: Tensor = bucket.buffer()
            return gradients

        return torch.futures.collect_all(works).then(back)

    @torch.no_grad()
    def _project(self, p: nn.Parameter, g: Tensor) -> Tensor:
        rule = cast("Rule", self.optimizer.strategy.rules[self.optimizer.rule_name(p)])
        state = self.optimizer.ready(p)[0].parts[0].state
        return rule.project(Dense(g), state, self.optimizer.hyper(p))

    def step(self, *_: Any) -> None:
        """Step the tensors whose projection was exchanged; their own gradients were never summed."""
        self.sent, self.last = 0, self.sent
        for p, low in self._low.items():
            shape = Dense(p.detach()).shape
            self.optimizer.step_param(p, Projected(shape, low, p.dtype))
            p.grad = None
        self._low.clear()


def low_rank_sync(model: nn.parallel.DistributedDataParallel, optimizer: LowMemOptimizer) -> LowRankSync:
    """Let copies of a model exchange projected gradients from now on.

    Args:
        model: wrapped; optimizer: over its parameters.

    Bytes that a rank sends in a step, of an (m, n) weight: 4 r max(m, n), or b m n where its basis is
    refreshed; b m n of what is not projected.

    Raises:
        UserError: a strategy that needs more of a gradient than its projection.

    Example:
        >>> import lowmem
        >>> model = nn.Linear(4, 4)
        >>> low_rank_sync(model, lowmem.optimizer(model, "adamw", lr=0.1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lowmem.errors.UserError: gradient_sync: adamw needs whole gradients; ...

    Source: the reduction is that of distributed low-rank optimizers such as Dion, arXiv 2504.05295.
    """
    if problem := needs_whole(optimizer.strategy):
        raise UserError(problem)
    sync = LowRankSync(optimizer)
    # its second argument goes by its name, and may have no annotation but one that is no text
    model.register_comm_hook(sync, lambda sync, bucket: sync.reduce(bucket))
    optimizer.register_step_pre_hook(sync.step)
    return sync


def needs_whole(strategy: Strategy) -> str:
    """Why projections of gradients do not suffice, or an empty string."""
    rule, name = strategy.rules["matrix"], strategy.name
    remedy = "take galore, or gradient_sync=whole"
    if rule.period == 1:
        return (
            f"gradient_sync: {name} refreshes at every step, by the whole gradient; take update_proj_gap > 1"
        )
    if rule.keeps_sum and strategy.source.needs_autograd and not strategy.schedule.observes:
        return ""
    return f"gradient_sync: {name} needs whole gradients; {remedy}"


def of_exchange(args: Any, strategy: Strategy, *, clips: bool) -> list[str]:
    """Problems of a run whose copies exchange projections, one sentence each.

    Args:
        args: training arguments; strategy: theirs; clips: whether they have a norm to clip to.
    """
    problem = needs_whole(strategy)
    rules = [
        (problem, problem),
        (args.fsdp, "gradient_sync: under fsdp ranks need whole gradients of their rows; leave it out"),
        (
            not problem and (args.clip == "global" or (args.clip == "auto" and clips)),
            "gradient_sync: the norm of whole gradients is not known where their projections are exchanged; "
            "set clip='none'",
        ),
        (args.fp16, "gradient_sync: a scaled gradient is known to be finite only as a whole; use bf16=True"),
    ]
    return [text for broken, text in rules if broken]
