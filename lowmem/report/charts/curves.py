"""Pictures with two continuous axes: curves named at their ends, and points with the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from lowmem.report.charts.svg import (
    LINE,
    Scale,
    canvas,
    circle,
    line,
    lines_of_text,
    narrow,
    polyline,
    spread,
    text,
    text_width,
    twice,
    width,
    wrap,
)
from lowmem.report.units import format_bytes, format_ticks, nice_range, unit

HUES = 8
HEIGHT = 380.0
TOP = 14.0
FOOT = 46.0
FLAT = 0.1
"""Of the largest value: what a vertical axis spans at least, so that noise does not look like a trend."""


@dataclass(frozen=True)
class Curve:
    """A named broken line; `css` overrides the colour it gets by its place."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str = ""


@dataclass(frozen=True)
class Axes:
    """The plotting area with its two scales, and the axes as SVG."""

    x: Scale
    y: Scale
    body: list[str]


def frame(
    xs: Sequence[float],
    ys: Sequence[float],
    names: tuple[str, str],
    right: float,
    height: float = HEIGHT,
    log: bool = False,
) -> Axes:
    """Axes around the data, with a grid and round ticks.

    Args:
        xs: all abscissas.
        ys: all ordinates.
        names: what the axes show, with units.
        right: px kept free on the right for labels.
        height: px of the picture.
        log: the data are base-2 logarithms; ticks name the numbers themselves.
    """
    x_ticks, x_names = _ticks(xs, 6, log)
    y_ticks, y_names = _ticks(ys, 5, log)
    left = 36 + max(text_width(n) for n in y_names)
    bottom = height - FOOT
    x = Scale(x_ticks[0], x_ticks[-1], left, width() - max(right, text_width(x_names[-1]) / 2 + 4))
    y = Scale(y_ticks[0], y_ticks[-1], bottom, TOP)
    body = [line(x.start, y(v), x.stop, y(v), "grid") for v in y_ticks]
    body += [line(x(v), bottom, x(v), bottom + 4, "grid") for v in x_ticks]
    body += [text(left - 8, y(v) + 4, n, "end", "tick") for v, n in zip(y_ticks, y_names, strict=True)]
    body += [text(x(v), bottom + 18, n, "middle", "tick") for v, n in zip(x_ticks, x_names, strict=True)]
    body.append(text((x.start + x.stop) / 2, bottom + 38, names[0], "middle", "axis"))
    body.append(upright(12, (TOP + bottom) / 2, names[1]))
    return Axes(x, y, body)


def _ticks(values: Sequence[float], count: int, log: bool) -> tuple[list[float], list[str]]:
    if not log:
        ticks = nice_range(min(values), max(values), count)
        return ticks, format_ticks(ticks)
    low, high = math.floor(min(values)), math.ceil(max(values))
    powers = [float(v) for v in range(low - (low == high), high + 1)]
    return powers, [f"{2**v:,.0f}" if v >= 0 else f"{2**v:g}" for v in powers]


def upright(x: float, middle: float, name: str) -> str:
    """The name of a vertical axis."""
    place = f'transform="rotate(-90)" x="{-middle:.1f}" y="{x:.1f}" text-anchor="middle"'
    return f'<text {place} class="axis">{escape(name)}</text>'


def hue(index: int) -> str:
    """Colour class of the index-th of several; after the last hue they start again, dashed."""
    return f"h{index % HUES}" + (f" d{min(index // HUES, 2)}" if index >= HUES else "")


def _under(drawn: Sequence[Curve], index: int) -> int:
    """How many of the curves before one share a stretch of it, and would be hidden."""
    own = set(itertools.pairwise(drawn[index].points))
    return sum(bool(own & set(itertools.pairwise(curve.points))) for curve in drawn[:index])


@twice
def curves(
    series: Sequence[Curve], names: tuple[str, str], label: str, log: bool = False, *, zero: bool = False
) -> str:
    """Broken lines, each named at its end where it can be read; no two names overlap.

    One that lies on another is dashed, and both are seen.

    Args:
        series: the curves; empty ones are left out.
        names: what the axes show, with units.
        label: what the picture shows, for screen readers.
        log: both axes double from tick to tick; zero: the vertical axis begins there.
    """
    if log:
        series = [replace(c, points=[(math.log2(x), math.log2(y)) for x, y in c.points]) for c in series]
    drawn = [c for c in series if c.points]
    labels = [wrap(c.name, 12 if narrow() else 30) for c in drawn]
    heights = [len(part) * LINE + 2 for part in labels]
    height = max(HEIGHT, sum(heights) + TOP + FOOT)
    right = 54 + max(text_width(row) for part in labels for row in part)
    xs, ys = zip(*[p for c in drawn for p in c.points], strict=True)
    if not log:
        ys = (*ys, *_span(ys, zero))
    area = frame(xs, ys, names, right, height, log)
    centres = spread([area.y(c.points[-1][1]) for c in drawn], heights, TOP, height - FOOT)
    for i, (curve, centre, part) in enumerate(zip(drawn, centres, labels, strict=True)):
        css = curve.css or hue(i)
        points = [(area.x(x), area.y(y)) for x, y in curve.points]
        if len(points) > 1:
            under = min(_under(drawn, i), 3)
            area.body.append(polyline(points, f"curve {css}" + (f" o{under}" if under else "")))
        few = points if len(points) <= 20 else points[-1:]
        above = sum(_under([curve, other], 1) for other in drawn[i + 1 :])
        area.body.extend(circle(x, y, 3 + 1.5 * above, f"dot {css}", curve.name) for x, y in few)
        area.body.append(line(points[-1][0] + 4, points[-1][1], area.x.stop + 22, centre, "leader"))
        area.body.append(polyline([(area.x.stop + 22, centre), (area.x.stop + 42, centre)], f"curve {css}"))
        area.body.append(lines_of_text(area.x.stop + 47, centre, part, "start", "label"))
    return canvas(height, area.body, label)


def _span(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """Ends of a vertical axis: zero where it begins there, and never less than a share of the values."""
    low, high = 0.0 if zero else min(values), max(values)
    missing = max(0.0, FLAT * abs(high) - (high - low))
    return max(low - missing / 2, min(low, 0.0)), high + missing / 2


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (less is better), by the first one.

    >>> front([(1.0, 5.0), (2.0, 6.0), (3.0, 1.0)])
    [0, 2]
    """
    best, kept = float("inf"), []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            kept.append(i)
            best = points[i][1]
    return kept


@twice
def pareto(
    names: Sequence[str], points: Sequence[tuple[float, float]], axes: tuple[str, str], label: str
) -> str:
    """Points named beside the plot, and a step line through those that nothing beats.

    Args:
        names: one for each point.
        points: (bytes, loss); less is better in both.
        axes: what the two are, without units; bytes get theirs here.
        label: what the picture shows, for screen readers.
    """
    best = front(points)
    name, step = unit(max(size for size, _ in points))
    sizes = [size / step for size, _ in points]
    shown = [f"{name}: {format_bytes(size)}" for name, (size, _) in zip(names, points, strict=True)]
    area = frame(sizes, [v for _, v in points], (f"{axes[0]}, {name}", axes[1]), 16)
    at = [(area.x(x), area.y(loss)) for x, (_, loss) in zip(sizes, points, strict=True)]
    labels = [wrap(text, 16 if narrow() else 40) for text in shown]
    places = _beside(at, labels, (area.x.start, width() - 4, TOP - 8, HEIGHT - FOOT))
    height = HEIGHT
    if places is None:  # too many to stand beside their points: in a column, with lines to them
        heights = [len(part) * LINE + 2 for part in labels]
        height = max(HEIGHT, sum(heights) + TOP + FOOT)
        right = 40 + max(text_width(row) for part in labels for row in part)
        area = frame(sizes, [v for _, v in points], (f"{axes[0]}, {name}", axes[1]), right, height)
        at = [(area.x(x), area.y(loss)) for x, (_, loss) in zip(sizes, points, strict=True)]
        centres = spread([y for _, y in at], heights, TOP, height - FOOT)
        places = [(area.x.stop + 26, centre, "start") for centre in centres]
        area.body.extend(
            line(x + 6, y, area.x.stop + 22, c, "leader") for (x, y), c in zip(at, centres, strict=True)
        )
    area.body.append(polyline(_steps([at[i] for i in best]), "front"))
    for i, ((x, y), part) in enumerate(zip(at, labels, strict=True)):
        title = f"{names[i]}: {format_bytes(points[i][0])}, {points[i][1]:.4f}"
        area.body.append(circle(x, y, 5.5 if i in best else 4.5, "dot on" if i in best else "dot off", title))
        css = "label strong" if i in best else "label muted"
        area.body.append(lines_of_text(places[i][0], places[i][1], part, places[i][2], css))
    return canvas(height, area.body, label)


Box = tuple[float, float, float, float]
"""Left, right, top and bottom."""


def _beside(
    at: Sequence[tuple[float, float]], labels: Sequence[Sequence[str]], room: Box
) -> list[tuple[float, float, str]] | None:
    """Where labels stand beside their points, over no other label or point; None where one finds no place.

    Args:
        at: the points; labels: lines of each; room: they must lie in.
    """
    taken: list[Box] = [(x - 7, x + 7, y - 7, y + 7) for x, y in at]
    places = []
    for (x, y), part in zip(at, labels, strict=True):
        long, tall = max(map(text_width, part)), len(part) * LINE
        for dx, dy in itertools.product((9.0, -9.0), (0.0, -tall / 2 - 8, tall / 2 + 8)):
            left = x + dx if dx > 0 else x + dx - long
            box = (left, left + long, y + dy - tall / 2, y + dy + tall / 2)
            inside = room[0] <= box[0] and box[1] <= room[1] and room[2] <= box[2] and box[3] <= room[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                places.append((x + dx, y + dy, "start" if dx > 0 else "end"))
                break
        else:
            return None
    return places


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    path = list(points[:1])
    for x, y in points[1:]:
        path += [(x, path[-1][1]), (x, y)]
    return path
