"""The longest sequence or the largest batch that fits a budget.

The search runs on the surface (closed forms, or a fit of shallow traces); the answer is then planned in
full, with the allocator simulated at the limit, and stepped down while that says it does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import UserError, nearest
from lowmem.memory import plan as planning
from lowmem.memory.device.gpus import Budget
from lowmem.memory.footprint import footprint
from lowmem.memory.run import Run
from lowmem.memory.surface import Surface
from lowmem.memory.trace.windows import special
from lowmem.models.positions import longest
from lowmem.optim.strategy import Strategy
from lowmem.report.units import format_bytes

GRAIN = {"seq_len": 64, "batch_size": 1}
LARGEST = {"seq_len": 1 << 20, "batch_size": 1 << 14}
MARGIN = 0.02  # of the capacity, kept free of tensors for fragmentation at the first guess
TRIES = 6


@dataclass(frozen=True)
class Solution:
    """One strategy's answer.

    Args:
        strategy: its name; plan: at the answer, None where nothing fits.
        value: the largest that fits, 0 where nothing does.
        stopped: by what: the model's longest sequence, the largest that is tried, or the budget.
    """

    strategy: str
    value: int
    stopped: str
    plan: planning.StrategyPlan | None


def largest(unknown: str, config: Any, run: Run, strategy: Strategy, limit: Budget) -> Solution:
    """The largest value of one option that fits.

    Args:
        unknown: "seq_len" or "batch_size".
        config: of the model; run: the other options; strategy: with its options.
        limit: the budget.

    Raises:
        UserError: another option than the two.
    """
    if unknown not in GRAIN:
        raise UserError(f"cannot solve for {unknown!r}; {nearest(unknown, GRAIN)}")
    grain = GRAIN[unknown]
    positions = longest(config)
    top = min(LARGEST[unknown], positions or LARGEST[unknown]) if unknown == "seq_len" else LARGEST[unknown]
    guess = _search(unknown, config, run, strategy, limit, top // grain) * grain
    name = strategy.name or "custom"
    for _ in range(TRIES):
        if guess < grain:
            break
        tried = replace(run, seq_len=guess) if unknown == "seq_len" else replace(run, batch_size=guess)
        row = planning.row(config, tried, strategy, limit, advise=False)
        if row.fits:
            return Solution(name, guess, _stopped(unknown, guess, top, positions, limit), row)
        short = (row.peak["reserved"] or row.peak["allocated"] or 1) / limit.capacity
        guess = min(guess - grain, int(guess * min(0.97, 1.02 / short)) // grain * grain)
    return Solution(name, 0, f"the budget: not even {grain} fits", None)


def _stopped(unknown: str, value: int, top: int, positions: int | None, limit: Budget) -> str:
    """What keeps the answer from being larger."""
    if value + GRAIN[unknown] <= top:
        return f"the budget of {format_bytes(limit.usable)}"
    if unknown == "seq_len" and top == positions:
        return f"the model's longest sequence, {positions}"
    return f"the largest that is tried, {top}"


def _search(unknown: str, config: Any, run: Run, strategy: Strategy, limit: Budget, top: int) -> int:
    """Largest multiple of the grain whose tensors fit, by bisection."""
    run = planning.suited(run, strategy)
    surface = Surface(config, run, special(strategy), longest(config) or 1 << 30)
    found = planning.traced(config, run, strategy)
    held = footprint(strategy, found.parameters, run)
    room = limit.capacity * (1 - MARGIN)

    def fits(count: int) -> bool:
        size = {"seq_len": run.seq_len, "batch_size": run.batch_size, unknown: count * GRAIN[unknown]}
        return surface.peak(held, size["batch_size"], size["seq_len"]) <= room

    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
