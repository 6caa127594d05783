"""What `lowmem plan` shows where no method was chosen: what fits the card, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError

from .. import render

if TYPE_CHECKING:
    from lowmem.memory.advice.search import Found
    from lowmem.memory.device.gpus import Budget
    from lowmem.memory.plan import Plan


def searched(
    model: str, gpu: str | None, budget: str | None, flags: Mapping[str, Any], *, full: bool, advise: bool
) -> tuple[Plan, tuple[Found, ...]]:
    """The rows of a search, and the plan of the first; its levers cost some seconds more."""
    from lowmem.memory import plan as planning
    from lowmem.memory.advice.search import search

    limit = planning.limit_of(gpu, budget, flags.get("compute_capability"))
    if limit is None:
        raise UserError("what fits depends on the card: give --gpu NAME or --budget 23.5GiB, or --optim NAME")
    found = search(model, limit, flags, full=full, gpu=gpu, budget=budget)
    best = found[0]
    run = {name: getattr(best.run, name) for name in best.run.__dataclass_fields__}
    planned = planning.plan(model, best.strategy, gpu=gpu, budget=budget, advise=advise, **run)
    return planned, found


def tables(planned: Plan, found: Sequence[Found], limit: Budget) -> list[Any]:
    """The ranked table, what its words mean, and the command of the first row."""
    from lowmem.report.plan import ORDER, RETRIES, SHOWN, subject

    size = render.size
    what = subject(planned.to_dict() | {"gpu": limit.to_dict()})
    head = f"{what}: what fits into {size(limit.capacity)}, best first"
    fitting = sum(row.verdict == "fits" for row in found)
    columns = [
        "",
        "method",
        "trains",
        "with",
        "verdict",
        "to spare",
        "allocated",
        "batch up to",
        "would fit with",
    ]
    rows = [
        [
            place, row.strategy.name, row.trains, ", ".join(row.levers) or "-",
            row.verdict + ("" if row.checked else " *"), size(row.headroom_bytes), size(row.peak.allocated),
            row.largest_batch or "-", row.needs or "-",
        ]
        for place, row in enumerate(found[:SHOWN], 1)
    ]  # fmt: skip
    more = len(found) - SHOWN
    said = [
        f"{fitting} of {len(found)} ways fit." + (f" {more} more with --json." if more > 0 else ""),
        ORDER,
        "* by the tensors of a few layers; without it the whole model was planned, its allocator simulated",
    ]
    said += [RETRIES] if any(row.verdict == "fits with retries" for row in found) else []
    said += [f"{found[0].strategy.name}: {sentence}" for sentence in planned.plans[0].why]
    said += [f"in full: {found[0].command}"] if found[0].command else []
    right = ["to spare", "allocated", "batch up to"]
    return [head, render.table("", columns, rows, right=right), *said]
