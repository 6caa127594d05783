"""Bars of bytes: stacked by category at the peak instant, lever by lever, predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem.report.charts.svg import (
    LINE,
    Scale,
    canvas,
    line,
    lines_of_text,
    narrow,
    rect,
    text,
    text_width,
    twice,
    width,
    wrap,
)
from lowmem.report.units import format_bytes, format_percent, format_ticks, nice_ticks, unit

CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "logits", "workspace")
BAR = 18.0
GAP = 14.0
TOP = 26.0
FOOT = 44.0
FULL = 46  # characters of a line of a narrow picture
FAR = 8  # a capacity beyond this many times the longest bar is named at the edge instead of drawn to scale


@dataclass(frozen=True)
class Bar:
    """One row: pieces from left to right as (css class, name, bytes), and what is written after it."""

    label: str
    pieces: Sequence[tuple[str, str, float]]
    note: str
    note_css: str = "value"

    @property
    def total(self) -> float:
        """Bytes of all pieces."""
        return sum(size for _, _, size in self.pieces)


def words(name: str) -> str:
    """A key as people write it: optimizer_state -> optimizer state."""
    return name.replace("_", " ")


def stacked(at_peak: Mapping[str, int], outside: float = 0) -> list[tuple[str, str, float]]:
    """Pieces of one bar in the fixed order, and what lies outside tensors."""
    known = [(f"c-{key}", words(key), float(at_peak.get(key, 0))) for key in CATEGORIES]
    more = [("c-other", words(key), float(size)) for key, size in at_peak.items() if key not in CATEGORIES]
    return [*known, *more, ("c-outside", "outside tensors", max(outside, 0.0))]


@twice
def bars(
    rows: Sequence[Bar], label: str, capacity: float | None = None, capacity_name: str = "budget"
) -> str:
    """Bars under one axis of bytes, with the capacity as a dashed line.

    Args:
        rows: the bars, top to bottom.
        label: what the picture shows, for screen readers.
        capacity: bytes of the line; named at the edge where it lies far outside the bars.
        capacity_name: what the line is.

    Returns:
        SVG text.
    """
    longest = max([row.total for row in rows], default=0.0)
    near = capacity is not None and capacity <= FAR * longest
    top = max(longest, capacity * 1.01 if capacity is not None and near else 0.0) or 1.0
    wrapped = [wrap(row.label) for row in rows]
    if narrow():  # names and notes stand above their bars
        left, right = 16.0, 24.0
    else:
        left = 12 + max((text_width(part) for lines in wrapped for part in lines), default=0.0)
        right = 16 + max((text_width(row.note) for row in rows), default=0.0)
    scale, body, ticks = _axis(top, left, width() - right)
    y = TOP
    for row, lines in zip(rows, wrapped, strict=True):
        if narrow():
            said = [*wrap(row.label, FULL), *wrap(row.note, FULL)]
            body += [text(left, y + (i + 1) * LINE - 5, part, css="label") for i, part in enumerate(said)]
            y += len(said) * LINE
            body.append(_pieces(row, y + BAR / 2, scale))
            y += BAR + GAP
            continue
        height = max(BAR, len(lines) * LINE)
        body += [_pieces(row, y + height / 2, scale), _names(row, lines, y + height / 2, left, scale)]
        y += height + GAP
    limit: list[str] = []
    if capacity is not None:
        limit = _capacity(capacity, capacity_name, near, scale, y)
    grid = [line(scale(at), TOP - 6, scale(at), y - 4, "grid") for at, _ in ticks]
    labels = [text(scale(at), y + 12, name, "middle", "tick") for at, name in ticks]
    name, _ = unit(top)
    axis = [text((left + width() - right) / 2, y + 30, name, "middle", "axis")]
    boxes, words_ = [part for part in body if "<text" not in part], [part for part in body if "<text" in part]
    return canvas(y + FOOT, [*grid, *boxes, *limit, *words_, *labels, *axis], label)


def _axis(top: float, start: float, stop: float) -> tuple[Scale, list[str], list[tuple[float, str]]]:
    _, step = unit(top)
    marks = nice_ticks(top / step, max(2, int((stop - start) // 90)))
    names = format_ticks(marks)
    return (
        Scale(0, marks[-1] * step, start, stop),
        [],
        [(m * step, n) for m, n in zip(marks, names, strict=True)],
    )


def _names(row: Bar, lines: Sequence[str], middle: float, left: float, scale: Scale) -> str:
    note = text(scale(row.total) + 6, middle + 4, row.note, "start", row.note_css)
    return lines_of_text(left - 8, middle, lines, "end", "label") + note


def _pieces(row: Bar, middle: float, scale: Scale) -> str:
    parts, at = [], 0.0
    for css, name, size in row.pieces:
        if size > 0:
            title = f"{row.label}: {name} {format_bytes(size)}"
            parts.append(rect(scale(at), middle - BAR / 2, scale(at + size) - scale(at), BAR, css, title))
        at += size
    return "".join(parts)


def _capacity(capacity: float, name: str, near: bool, scale: Scale, bottom: float) -> list[str]:
    words_ = f"{name} {format_bytes(capacity)}"
    if not near:
        return [text(scale.stop, TOP - 12, f"{words_}, far to the right \u2192", "end", "capacity-text")]
    x = scale(capacity)
    half = text_width(words_) / 2
    at = min(max(x, half + 4), width() - half - 4)
    return [
        line(x, TOP - 8, x, bottom - 4, "capacity"),
        text(at, TOP - 12, words_, "middle", "capacity-text"),
    ]


def waterfall(rows: Sequence[Mapping[str, object]], capacity: float | None = None) -> str:
    """Peak after each lever, the first row being the baseline; a lever that gains nothing is shown as such.

    Args:
        rows: {"lever": name, "peak": bytes, "event": name or absent}, each with all levers above it.
        capacity: bytes of the line: what there is for tensors.
    """
    before: float | None = None
    drawn = []
    for row in rows:
        peak = float(row["peak"])  # type: ignore[arg-type]
        drawn.append(_lever(str(row["lever"]), peak, before))
        before = peak
    return bars(drawn, "Peak memory after each lever", capacity, "for tensors")


def _lever(name: str, peak: float, before: float | None) -> Bar:
    if before is None:
        return Bar(name, [("c-base", "peak", peak)], format_bytes(peak))
    change = peak - before
    if change == 0:
        return Bar(name, [("c-base", "peak", peak)], f"{format_bytes(peak)}, gains nothing", "value muted")
    note = f"{format_bytes(peak)} ({format_bytes(change, signed=True)})"
    if change < 0:
        return Bar(name, [("c-base", "peak", peak), ("c-saved", "saved", -change)], note)
    return Bar(name, [("c-base", "peak before", before), ("c-cost", "added", change)], note)


def pairs(
    predicted: Mapping[str, float], measured: Mapping[str, float], errors: Mapping[str, float | None]
) -> str:
    """Two bars for each row that both know, the signed error after the second."""
    drawn = []
    for key in measured:
        if key not in predicted or key == "state_bytes":  # shown as the category's row already
            continue
        drawn.append(
            Bar(
                f"{words(key)}, predicted",
                [("c-predicted", "predicted", predicted[key])],
                format_bytes(predicted[key]),
            )
        )
        note = f"{format_bytes(measured[key])} ({format_percent(errors.get(key))})"
        drawn.append(Bar("measured", [("c-measured", "measured", measured[key])], note))
    return bars(drawn, "Predicted and measured bytes")
