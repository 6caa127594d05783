"""How many cards a run needs when FSDP2 spreads its weights over them.

Weights, gradients and state divide by the number of cards; activations, logits and what is gathered do not,
so that some runs fit on no number. By the tensors of a few layers, with room left for the allocator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowmem.memory import between
from lowmem.memory.advice.ways import problem
from lowmem.memory.footprint import Steps, combine, footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.memory.trace.windows import special
from lowmem.optim.strategy import Strategy

NUMBERS: tuple[int, ...] = tuple(1 << i for i in range(13))
"""Those that are tried."""


def needed(
    config: Any, run: Run, strategy: Strategy, room: int, *, above: int = 0, steps: Steps = "all"
) -> int:
    """The fewest cards, a power of two, whose tensors leave room; 0 where no number does.

    Args:
        config: of the model; run: as the strategy takes it; room: bytes for the tensors of one card.
        above: cards that are too few; steps: whose scratch counts, as in `footprint`.
    """
    before = None
    for ranks in (n for n in NUMBERS if n > above):
        tried = replace(run, ranks=ranks, per_node=None)
        found = extrapolated(config, tried, special(strategy))
        size = 0
        for counted in dict.fromkeys(("none", steps)):  # scratch takes longest to count, and only adds
            held = footprint(strategy, found.parameters, tried, steps=counted)
            size = combine(found, held, between.above(config, tried, found, held)).allocated
            if size > room:
                break
        else:
            return ranks
        if before is not None and size >= before:  # rows are padded to equal chunks: what is gathered grows
            return 0
        before = size
    return 0


def wider(config: Any, run: Run, strategy: Strategy, room: int) -> int | None:
    """The fewest cards, more than a run has, over which state and tensors would fit; 0 where no number does.

    Returns:
        None for a run that cannot be spread.
    """
    if run.shard != "full" or problem(replace(run, ranks=max(2, run.ranks)), strategy):
        return None
    return needed(config, run, strategy, room, above=run.ranks, steps="none")
