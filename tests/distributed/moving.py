"""What each method moves between ranks in a step: counted by the library, and what really moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lowmem
from lowmem.memory.exchange import exchanged
from lowmem.optim.engine.cutting import policy
from lowmem.optim.strategy import Strategy
from tests.contract.test_bits import normal
from tests.distributed.placing import spread
from tests.enrolled import on_any_model

SHAPE, RANKS = (4096, 11008), 2
SMALL = ((12, 40), (37, 12))
"""Shapes whose steps are really taken, a wide one and one that two ranks hold unevenly."""
FEW = ("adamw", "adam_mini", "galore", "ldadam", "muon", "sm3", "smmf")
"""Methods of each kind."""
KINDS = {
    "nothing": "by elements alone, or by rows that are whole on a rank",
    "numbers": "sums and largest elements of the tensor, at most 40 bytes",
    "a row": "sums or maxima of columns, once or a few times",
    "r x n": "a projected gradient or the basis, r of the method's default; in brackets with a refresh",
    "whole": "weight and gradient, or a momentum of which every rank needs all rows",
    "losses": "4 bytes for each loss, nothing of a weight",
    "refused": "sums over all tensors, which is not done for sharded ones yet",
}


def steppable() -> dict[str, Strategy]:
    """Methods that step one tensor by its gradient."""
    made = {name: lowmem.create(name) for name in on_any_model()}
    return {name: s for name, s in made.items() if s.source.needs_autograd and not _joint(s)}


def _joint(strategy: Strategy) -> bool:
    return any(rule.joint for rule in strategy.rules.values())


def kind(strategy: Strategy) -> tuple[str, str]:
    """What a method moves for the weight of the guide, in a word and in bytes."""
    if not strategy.source.needs_autograd:
        return "losses", ""
    if _joint(strategy):
        return "refused", ""
    with policy("cuda"):  # whole tensors at once: fewer launches
        often = sum(exchanged(strategy, SHAPE, torch.bfloat16))
        begins = any(rule.period for rule in strategy.rules.values())
        rare = sum(exchanged(strategy, SHAPE, torch.bfloat16, refresh=True)) if begins else often
    told = f"{often:,}" if often == rare else f"{often:,} ({rare:,})"
    m, n = SHAPE
    limits = {"nothing": 0, "numbers": 40, "a row": 24 * n, "r x n": m * n, "whole": 8 * m * n}
    return next(word for word, most in limits.items() if often <= most), told if often else ""


def entry(name: str) -> tuple[str, str]:
    """What a method moves, and its place in the table."""
    word, told = kind(lowmem.create(name))
    return word, f"`{name}` {told}".strip()


def table() -> str:
    """What the checks below hold, as Markdown."""
    found: dict[str, list[str]] = {word: [] for word in KINDS}
    for name in on_any_model():
        word, told = entry(name)
        found[word].append(told)
    lines = ["| moved in a step | what it is | methods, and bytes |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {word} | {KINDS[word]} | {', '.join(found[word])} |" for word in KINDS)])


@contextmanager
def weighed() -> Iterator[list[int]]:
    """Bytes of each tensor that is summed, or gathered of all ranks."""
    seen: list[int] = []

    def noting(call: Callable[..., Any], size: Callable[[Any], int]) -> Callable[..., Any]:
        def note(first: Any, *args: Any, **given: Any) -> Any:
            seen.append(size(first))
            return call(first, *args, **given)

        return note

    with ExitStack() as stack:
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor"):
            many = name == "all_gather"
            size = (lambda tensors: sum(x.nbytes for x in tensors)) if many else (lambda x: x.nbytes)
            stack.enter_context(patch.object(dist, name, noting(getattr(dist, name), size)))
        yield seen


def moved(mesh: Any, names: Collection[str] = ()) -> list[str]:
    """Methods of which other bytes moved than were counted, at the first step or at an ordinary one."""
    found = []
    for name, strategy in steppable().items():
        if names and name not in names:
            continue
        for shape in SMALL:
            model = nn.Module()
            model.w = nn.Parameter(normal(shape, -1))
            fully_shard(model, mesh=mesh)
            if strategy.turns or strategy.asks:  # who rests, and what is asked for, is not about a tensor
                continue
            optimizer = lowmem.optimizer(model, strategy, lr=0.01)
            for step in range(2):
                model.w.grad = spread(normal(shape, step), model.w)
                with weighed() as seen:
                    optimizer.step()
                known = exchanged(strategy, shape, ranks=mesh.size(), refresh=step == 0)
                if sum(seen) != sum(known) and not strategy.schedule.observes:
                    found.append(f"{name} {shape} step {step}: moved {seen}, {known} were counted")
    return found
