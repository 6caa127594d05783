"""Bytes as people read them: binary units, always labelled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def unit(size: float) -> tuple[str, int]:
    """Name and size of the unit in which `size` bytes read best.

    >>> unit(3 * 2**20)
    ('MiB', 1048576)
    """
    return next(((name, step) for name, step in UNITS if abs(size) >= step), UNITS[-1])


def format_bytes(size: float | None, *, signed: bool = False) -> str:
    """`size` with its unit: GiB to two places, MiB and KiB to one, bytes whole; a dash for None.

    >>> format_bytes(53924429824), format_bytes(3.5 * 2**20), format_bytes(-512, signed=True)
    ('50.22 GiB', '3.5 MiB', '-512 B')
    """
    if size is None:
        return "-"
    name, step = unit(size)
    places = {"GiB": 2, "MiB": 1, "KiB": 1, "B": 0}[name]
    sign = "+" if signed and size != 0 else ""
    return f"{size / step:{sign},.{places}f} {name}"


def format_percent(value: float | None) -> str:
    """A signed error to two places, a smaller one to its first digit, a dash for None.

    >>> format_percent(-1.504), format_percent(0.00041), format_percent(0.0)
    ('-1.50 %', '+0.0004 %', '0 %')
    """
    if value is None:
        return "-"
    if value == 0:
        return "0 %"
    places = 2 if abs(value) >= 0.005 else -_floor_log10(value)
    return f"{value:+.{places}f} %"


def nice_ticks(top: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `top`, about `count` steps of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(45)
    [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    """
    if top <= 0:
        return [0.0, 1.0]
    return nice_range(0.0, top, count)


def nice_range(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]; a span of zero is opened by 5 % (or 1) on both sides."""
    if high <= low:
        margin = abs(low) * 0.05 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    exponent = _floor_log10(raw)
    steps = (m * 10.0**exponent for m in (1, 2, 2.5, 5, 10))
    step = next(s for s in steps if s >= raw * 0.999)
    first, last = int(low // step), -int(-high // step)
    return [round(step * i, 3 - exponent) for i in range(first, last + 1)]


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def format_ticks(values: Sequence[float]) -> list[str]:
    """Labels with as few decimals as each tick needs to be written exactly.

    >>> format_ticks([0.0, 2.5, 5.0])
    ['0.0', '2.5', '5.0']
    """
    gap = min((abs(b - a) for a, b in itertools.pairwise(values)), default=1.0)
    for places in range(20):
        labels = [f"{v:,.{places}f}" for v in values]
        if all(abs(float(s.replace(",", "")) - v) <= gap / 1000 for s, v in zip(labels, values, strict=True)):
            break
    return labels
