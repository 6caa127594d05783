"""The learning rate of the least loss, by walking a grid: 1, 3, 10, 30, ... of a first one.

A method is compared with others at the best rate of its own, and a grid that all have in common keeps one of
them from a rate that lies nearer to its best by luck. The walk begins at the rate that a paper or a record
names, takes three runs where that is the best one, and follows the losses otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def least(first: float, loss: Callable[[float], float], most: int) -> float | None:
    """The rate of the least loss: up or down from the first, until the next is worse.

    Args:
        first: the rate that is tried first; where its loss is infinite, lower ones are.
        loss: of a run at a rate; infinite where the run broke off.
        most: rates that are tried at most.

    Returns:
        A rate of the grid, or None where no loss of those tried is finite.

    Example:
        >>> least(1e-3, lambda lr: abs(lr - 9e-5), most=6)
        0.0001
    """
    losses: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in losses and len(losses) < most:
            losses[k] = loss(rated(first, k))
        return losses.get(k, math.inf)

    best = 0
    while at(best) == math.inf and len(losses) < most:
        best -= 1
    for way in (1, -1):
        while at(best + way) < at(best):
            best += way
    return None if at(best) == math.inf else rated(first, best)


def rated(first: float, k: int) -> float:
    """A rate so many places above the first: 1, 3, 10, 30, ... times it; from 3 on, 3, 10, 30, 100, ..."""
    half = 10 / 3 if f"{first:e}".startswith("3.0") else 3
    return float(f"{first * 10 ** (k // 2) * (half if k % 2 else 1):.3g}")


def on_grid(lr: float) -> float:
    """The nearest of 1, 3, 10, 30, ...: methods that are much alike are to be tried at the same rates."""
    return rated(1.0, round(2 * math.log10(lr)))
