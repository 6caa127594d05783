"""What fits where: peak over sequence length x batch size, and the frontier of what a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report.charts.curves import upright
from lowmem.report.charts.svg import canvas, line, rect, text, text_width, twice, width
from lowmem.report.units import format_bytes, unit

CELL = 30.0
AMPLE, TIGHT = 0.10, 0.03  # shares of the capacity left free


def band(peak: float, capacity: float) -> str:
    """How a peak stands to the capacity: ample (10 % or more free), tight (3 %), thin (less), over."""
    free = (capacity - peak) / capacity
    if free < 0:
        return "over"
    return "ample" if free >= AMPLE else "tight" if free >= TIGHT else "thin"


@twice
def heat_map(grid: Mapping[str, Any], capacity: float | None) -> str:
    """One cell for each sequence length (rows, longest on top) and batch size (columns).

    Args:
        grid: {"seq_lens": [int], "batch_sizes": [int], "peak": [[bytes per batch] per seq_len]}.
        capacity: bytes; cells are coloured by what it leaves free and the frontier is drawn. Without it
            darker means more.
    """
    order = sorted(range(len(grid["seq_lens"])), key=lambda i: -grid["seq_lens"][i])
    lengths = [f"{grid['seq_lens'][i]:,}" for i in order]
    peaks = [grid["peak"][i] for i in order]
    left = 34 + max(text_width(name) for name in lengths)
    cell = min(96.0, (width() - left - 8) / len(grid["batch_sizes"]))
    name, step = unit(max(size for row in peaks for size in row))
    top, body = 24.0, [text(left - 8, 14, f"peak in {name}", "start", "axis")]
    for row, (length, sizes) in enumerate(zip(lengths, peaks, strict=True)):
        y = top + row * CELL
        body.append(text(left - 8, y + CELL / 2 + 4, length, "end", "tick"))
        body += [_cell(left + i * cell, y, cell, size, step, capacity, peaks) for i, size in enumerate(sizes)]
    bottom = top + len(peaks) * CELL
    for i, batch in enumerate(grid["batch_sizes"]):
        body.append(text(left + (i + 0.5) * cell, bottom + 16, f"{batch:,}", "middle", "tick"))
    body.append(text(left + len(grid["batch_sizes"]) * cell / 2, bottom + 34, "batch size", "middle", "axis"))
    body.append(upright(12, (top + bottom) / 2, "sequence length"))
    if capacity is not None:
        body += _frontier(peaks, capacity, left, top, cell)
    return canvas(
        bottom + 44, body, f"Peak memory over sequence length and batch size, {grid.get('strategy', '')}"
    )


def _cell(
    x: float,
    y: float,
    across: float,
    size: float,
    step: int,
    capacity: float | None,
    peaks: Sequence[Sequence[float]],
) -> str:
    css = f"m-{band(size, capacity)}" if capacity is not None else f"m-{_shade(size, peaks)}"
    number = f"{size / step:,.1f}"
    title = format_bytes(size) + (
        ""
        if capacity is None
        else f", {format_bytes(capacity - size)} free"
        if size <= capacity
        else f", {format_bytes(size - capacity)} too much"
    )
    return rect(x + 1, y + 1, across - 2, CELL - 2, css, title) + text(
        x + across / 2, y + CELL / 2 + 4, number, "middle", f"cell t-{css}"
    )


def _shade(size: float, peaks: Sequence[Sequence[float]]) -> int:
    every = [s for row in peaks for s in row]
    low, high = min(every), max(every)
    return 0 if high == low else min(4, int(5 * (size - low) / (high - low)))


def _frontier(
    peaks: Sequence[Sequence[float]], capacity: float, left: float, top: float, cell: float
) -> list[str]:
    """Edges between a cell that fits and a neighbour that does not."""
    edges = []
    for r, row in enumerate(peaks):
        for c, size in enumerate(row):
            x, y = left + c * cell, top + r * CELL
            if c + 1 < len(row) and (size <= capacity) != (row[c + 1] <= capacity):
                edges.append(line(x + cell, y, x + cell, y + CELL, "frontier"))
            if r + 1 < len(peaks) and (size <= capacity) != (peaks[r + 1][c] <= capacity):
                edges.append(line(x, y + CELL, x + cell, y + CELL, "frontier"))
    return edges


def frontier(grid: Mapping[str, Any], capacity: float) -> list[int | None]:
    """Longest sequence of the grid that fits, for each batch size; None where none does."""
    fits: list[int | None] = []
    for column in range(len(grid["batch_sizes"])):
        lengths = [
            n for n, row in zip(grid["seq_lens"], grid["peak"], strict=True) if row[column] <= capacity
        ]
        fits.append(max(lengths, default=None))
    return fits
