"""What `lowmem plan` shows where no method was chosen: what fits the card, best first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError
from lowmem.memory.run import Run

from .. import render
from .._report import tabulated

NAMED = 3  # methods that a reason is said of by name

if TYPE_CHECKING:
    from lowmem.memory.advice.found import Found
    from lowmem.memory.advice.search import Rows
    from lowmem.memory.device.gpus import Budget
    from lowmem.memory.plan import Plan


def searched(
    model: str, gpu: str | None, budget: str | None, flags: Mapping[str, Any], *, full: bool, advise: bool
) -> tuple[Plan, tuple[Found, ...]]:
    """The rows of a search, and the plan of the first; its levers cost some seconds more."""
    from lowmem.memory.device.gpus import limit_of

    limit = limit_of(gpu, budget, flags.get("compute_capability"), flags.get("device") or Run.device)
    if limit is None:
        raise UserError("what fits depends on the card: give --gpu NAME or --budget 23.5GiB, or --optim NAME")
    with _sharing(model=model, limit=limit, options=dict(flags), full=full) as beside:
        from lowmem.memory import plan as planning
        from lowmem.memory.advice.search import search

        found = search(model, limit, flags, full=full, gpu=gpu, budget=budget, beside=beside)
    best = found[0]
    run = {name: getattr(best.run, name) for name in best.run.__dataclass_fields__}
    planned = planning.plan(model, best.strategy, gpu=gpu, budget=budget, advise=advise, **run)
    return planned, found


@contextmanager
def _sharing(**asked: Any) -> Iterator[Callable[[], Rows]]:
    """A second process for the search, where there is a core for it."""
    from lowmem.memory.advice.beside import Beside

    if (os.cpu_count() or 1) < 2:
        yield dict
        return
    beside = Beside(**asked)
    try:
        yield beside.rows
    finally:
        beside.stop()


def tables(planned: Plan, found: Sequence[Found], limit: Budget) -> list[Any]:
    """The ranked table, what its words mean, and the command of the first row."""
    from lowmem.report.plan import ORDER, RETRIES, SHOWN, STAR, subject, ways

    what = subject(planned.to_dict() | {"gpu": limit.to_dict()})
    head = f"{what}: what fits into {render.size(limit.capacity)}, best first"
    fitting, more = sum(row.verdict == "fits" for row in found), len(found) - SHOWN
    said = [f"{fitting} of {len(found)} ways fit." + (f" {more} more with --json." if more > 0 else "")]
    said += [ORDER, STAR]
    said += [RETRIES] if any(row.verdict == "fits with retries" for row in found) else []
    said += _kept_off(found[:SHOWN])
    said += [f"{found[0].strategy.name}: {sentence}" for sentence in planned.plans[0].why]
    said += [f"in full: {found[0].command}"] if found[0].command else []
    return [head, tabulated("", ways([way.to_dict() for way in found])), *said]


def _kept_off(found: Sequence[Found]) -> list[str]:
    """Levers that rows which do not fit do not take, and why, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in found:
        for lever, why in row.refused.items():
            named = reasons.setdefault((lever, why), [])
            named += [] if row.strategy.name in named else [row.strategy.name]
    said = []
    for (lever, why), names in reasons.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said.append(f"no {lever} for {', '.join(names[:NAMED])}{more}: {why}.")
    return said
