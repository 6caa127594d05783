"""The levers of a run, in the order of what they cost in time, and the run under each choice of them.

A lever is an option of the run that is on or off. Where neither the user has decided it nor the run, the
method or the card refuses it, it is open; the ways of a run are all choices of its open levers, like the
numbers of a counter: what costs least time turns first. One more lever is one more row of LEVERS.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem.errors import UserError
from lowmem.memory import gather
from lowmem.memory.advice.kinds import kind_of
from lowmem.memory.device.gpus import Budget
from lowmem.memory.run import Run
from lowmem.optim.strategy import Strategy

Way = tuple[Run, tuple[str, ...]]
"""A run, and the names of what lowers its peak."""


@dataclass(frozen=True)
class Choice:
    """One lever.

    Args:
        name: as rows show it; option: of the run.
        idle: why it gains nothing on a card, "" where it may; what is not allowed says `gather` by itself.
        beside: another option that it is taken with, where that one is open: alone it costs more and spares
            less.
        time: what it costs of it, against the others; 0 for nothing worth ranking by.
        last: taken only where no method fits without it.
    """

    name: str
    option: str
    idle: Callable[[Run, Strategy, Budget], str] = lambda run, strategy, card: ""
    beside: str = ""
    time: int = 0
    last: bool = False


def _waits(run: Run, strategy: Strategy, card: Budget) -> str:
    if run.adapts:
        return "gradients of adapters are small"
    if run.accumulation > 1:
        return "gradients are kept from one micro-batch to the next"
    return strategy.waits


def _near(run: Run, strategy: Strategy, card: Budget) -> str:
    if run.device == "cpu" or card.unified:
        return "the host's memory is the same"
    return ""


def _stays(run: Run, strategy: Strategy, card: Budget) -> str:
    if run.adapts:
        return "state of adapters is small"
    if kind_of(strategy, run) == "no moments":
        return "there is next to no state"
    return _near(run, strategy, card)


LEVERS = (
    Choice("release", "gradient_release", _waits),
    Choice("checkpointing", "gradient_checkpointing", time=1),
    Choice("activation offload", "activation_offload", _near, "gradient_checkpointing", time=2),
    Choice("state offload", "offload_state", _stays, time=4, last=True),
)
"""From what costs least time to what costs most."""


def time(run: Run) -> int:
    """How much time the levers of a run cost, to rank by."""
    return sum(lever.time for lever in LEVERS if getattr(run, lever.option))


def refused(lever: Choice, run: Run, strategy: Strategy, card: Budget) -> str:
    """Why a run does not take a lever, or gains nothing by it; "" where it is open.

    Args:
        lever: one of LEVERS; run: without it; strategy, card: of the run.
    """
    if not strategy.source.needs_autograd:
        return "there is no backward pass to keep anything for"
    option: dict[str, Any] = {lever.option: True}
    return lever.idle(run, strategy, card) or problem(replace(run, **option), strategy)


def problem(run: Run, strategy: Strategy) -> str:
    """What is wrong with a run, by itself or under a strategy; "" where it can be planned."""
    return _refusal(run) or gather.unsuited(strategy.name or "the strategy", strategy, run)


@functools.lru_cache(maxsize=256)
def _refusal(run: Run) -> str:
    """What `gather` says of the options of a run, "" where it takes them."""
    try:
        gather.make_run(asdict(run))
    except UserError as error:
        return str(error)
    return ""


def ways(run: Run, levers: Collection[Choice]) -> Iterator[Way]:
    """The run under each choice of open levers, cheapest first.

    Args:
        run: as it is decided; levers: that are open.

    Example:
        >>> [names for _, names in ways(Run(), LEVERS)][:4]
        [(), ('release',), ('checkpointing',), ('release', 'checkpointing')]
    """
    options = [lever.option for lever in LEVERS if lever in levers]
    for turned in itertools.product((False, True), repeat=len(options)):
        chosen: dict[str, Any] = dict(zip(options, turned[::-1], strict=True))
        apart = (chosen.get(one.option) and not chosen.get(one.beside, True) for one in LEVERS)
        if any(apart):
            continue
        norm = 0.0 if chosen.get("gradient_release", run.gradient_release) else run.max_grad_norm
        changed = replace(run, **chosen, max_grad_norm=norm)
        yield changed, names(changed)


def names(run: Run) -> tuple[str, ...]:
    """Of what lowers the peak of a run."""
    on = [lever.name for lever in LEVERS if getattr(run, lever.option)]
    return (*on, *(["chunked loss"] if run.loss == "chunked" else []))
