"""The longest sequence or the largest batch that fits a budget.

    1  the largest whose tensors fit, by closed form or by shallow traces at points that secants choose
    2  that is planned in full, with the allocator simulated at the limit
    3  where fragments leave no room: less by what they take, then up and down until the boundary is found

Every answer has been planned in full; so many are planned at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.errors import UserError, nearest
from lowmem.memory import plan as planning
from lowmem.memory.advice.levers import quick_peak
from lowmem.memory.advice.ways import problem
from lowmem.memory.device.gpus import Budget
from lowmem.memory.footprint import footprint
from lowmem.memory.run import Run
from lowmem.models.positions import longest
from lowmem.optim.strategy import Strategy
from lowmem.report.units import format_bytes

GRAIN = {"seq_len": 64, "batch_size": 1}
LARGEST = {"seq_len": 1 << 20, "batch_size": 1 << 14}
TRIES = 8  # plans in full
REACH = 8  # times the largest that is known to fit, to look for one that does not
BISECTED = 3  # every so many points halve what is left, where secants come from one side


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


@dataclass(frozen=True)
class Grid:
    """Values that are looked at: least, least + grain, ... up to top."""

    unknown: str
    least: int
    grain: int
    top: int

    @property
    def last(self) -> int:
        """Number of the largest, from 0."""
        return (self.top - self.least) // self.grain

    def run(self, run: Run, number: int) -> Run:
        """The run at one of them."""
        return at(run, self.unknown, self.least + number * self.grain)


def at(run: Run, unknown: str, value: int) -> Run:
    """The run with another value of one option."""
    changed: dict[str, Any] = {unknown: value}
    return replace(run, **changed)


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
    positions = longest(config) if unknown == "seq_len" else None
    grid = _grid(unknown, run, strategy, min(LARGEST[unknown], positions or LARGEST[unknown]))
    suited = planning.suited(run, strategy)
    held = footprint(strategy, planning.traced(config, run, strategy).parameters, suited)
    tensors = Boundary(lambda n: quick_peak(config, grid.run(suited, n), held).allocated)

    def plan(number: int) -> planning.StrategyPlan:
        return planning.row(config, grid.run(run, number), strategy, limit, advise=False)

    name = strategy.name or "custom"
    number, row = _confirmed(plan, tensors, grid.last, limit)
    if row is None:
        return Solution(name, 0, f"the budget: not even {grid.least} fits", None)
    value = grid.least + number * grid.grain
    return Solution(name, value, _stopped(grid, value, positions, limit), row)


def _grid(unknown: str, run: Run, strategy: Strategy, top: int) -> Grid:
    """The values that can be planned: a task may ask for two rows at least, or for a multiple of some."""
    grain = GRAIN[unknown]
    if unknown == "seq_len":
        return Grid(unknown, min(grain, top), grain, top)

    def refused(rows: int) -> bool:
        return bool(problem(at(run, unknown, rows), strategy))

    if refused(run.batch_size):  # whatever it is, it is not for the batch to say
        return Grid(unknown, grain, grain, top)
    least = next(rows for rows in range(1, run.batch_size + 1) if not refused(rows))
    return Grid(unknown, least, least if refused(least + 1) else grain, top)


def _stopped(grid: Grid, value: int, positions: int | None, limit: Budget) -> str:
    """What keeps the answer from being larger."""
    if value + grid.grain <= grid.top:
        return f"the budget of {format_bytes(limit.usable)}"
    if grid.top == positions:
        return f"the model's longest sequence, {positions}"
    return f"the largest that is tried, {grid.top}"


def _confirmed(
    plan: Callable[[int], planning.StrategyPlan], tensors: Boundary, last: int, limit: Budget
) -> tuple[int, planning.StrategyPlan | None]:
    """The largest number that fits when it is planned in full, and its plan; none where not even 0 does."""
    low, high, best = -1, tensors.below(limit.capacity, last) + 1, None
    number, left = high - 1, TRIES
    while high - low > 1 and left:
        left -= 1
        row = plan(number)
        if row.fits:
            low, best = number, row
        else:
            high = number
        if low >= 0:
            number = (low + high) // 2
        elif left == 1:
            number = 0
        else:
            number = max(0, tensors.below(int(limit.capacity * _share(row)), high - 1))
    return low, best


def _share(row: planning.StrategyPlan) -> float:
    """Of what is reserved, what tensors take."""
    allocated = row.peak["allocated"] or 1
    return allocated / (row.peak["reserved"] or allocated)


@dataclass
class Boundary:
    """Where something that grows passes a limit; each look takes long, and is remembered.

    Args:
        look: the size at a number.
    """

    look: Callable[[int], int]
    known: dict[int, int] = field(default_factory=dict)

    def size(self, number: int) -> int:
        """The size at a number."""
        if number not in self.known:
            self.known[number] = self.look(number)
        return self.known[number]

    def below(self, limit: int, last: int) -> int:
        """The largest number up to the last whose size is within a limit, -1 where there is none."""
        if last < 0 or self.size(0) > limit:
            return -1
        fits = [n for n, size in self.known.items() if size <= limit and n <= last]
        low = max(fits)
        high = min((n for n in self.known if low < n <= last), default=last + 1)
        for turn in range(1, 64):
            if high - low <= 1:
                break
            number = (low + high) // 2 if turn % BISECTED == 0 and high in self.known else 0
            number = number or self._secant(limit, low, high)
            low, high = (number, high) if self.size(number) <= limit else (low, number)
        return low

    def _secant(self, limit: int, low: int, high: int) -> int:
        """Where a line through two known points passes the limit, between low and high."""
        before = max((n for n in self.known if n < low), default=None)
        other = high if high in self.known else before
        if other is None:
            return low + 1
        slope = (self.size(other) - self.size(low)) / (other - low)
        root = low + int((limit - self.size(low)) / slope) if slope > 0 else high
        most = high - 1 if high in self.known else min(high - 1, REACH * (low + 1))
        return max(low + 1, min(most, root))
