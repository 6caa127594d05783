"""Pictures with two continuous axes: curves named at their ends, and points with the Pareto front."""

from __future__ import annotations

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


@twice
def curves(series: Sequence[Curve], names: tuple[str, str], label: str, log: bool = False) -> str:
    """Broken lines, each named at its end where it can be read; no two names overlap.

    Args:
        series: the curves; empty ones are left out.
        names: what the axes show, with units.
        label: what the picture shows, for screen readers.
        log: both axes double from tick to tick.
    """
    if log:
        series = [replace(c, points=[(math.log2(x), math.log2(y)) for x, y in c.points]) for c in series]
    drawn = [c for c in series if c.points]
    labels = [wrap(c.name, 12 if narrow() else 30) for c in drawn]
    heights = [len(part) * LINE + 2 for part in labels]
    height = max(HEIGHT, sum(heights) + TOP + FOOT)
    right = 54 + max(text_width(row) for part in labels for row in part)
    xs, ys = zip(*[p for c in drawn for p in c.points], strict=True)
    area = frame(xs, ys, names, right, height, log)
    centres = spread([area.y(c.points[-1][1]) for c in drawn], heights, TOP, height - FOOT)
    for i, (curve, centre, part) in enumerate(zip(drawn, centres, labels, strict=True)):
        css = curve.css or hue(i)
        points = [(area.x(x), area.y(y)) for x, y in curve.points]
        if len(points) > 1:
            area.body.append(polyline(points, f"curve {css}"))
        few = points if len(points) <= 20 else points[-1:]
        area.body.extend(circle(x, y, 3, f"dot {css}", curve.name) for x, y in few)
        area.body.append(line(points[-1][0] + 4, points[-1][1], area.x.stop + 22, centre, "leader"))
        area.body.append(polyline([(area.x.stop + 22, centre), (area.x.stop + 42, centre)], f"curve {css}"))
        area.body.append(lines_of_text(area.x.stop + 47, centre, part, "start", "label"))
    return canvas(height, area.body, label)


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
    shown = [f"{name}: {format_bytes(size)}" for name, (size, _) in zip(names, points, strict=True)]
    labels = [wrap(name, 14 if narrow() else 40) for name in shown]
    heights = [len(part) * LINE + 2 for part in labels]
    height = max(HEIGHT, sum(heights) + TOP + FOOT)
    right = 40 + max(text_width(row) for part in labels for row in part)
    name, step = unit(max(size for size, _ in points))
    area = frame(
        [s / step for s, _ in points], [v for _, v in points], (f"{axes[0]}, {name}", axes[1]), right, height
    )
    at = [(area.x(size / step), area.y(loss)) for size, loss in points]
    area.body.append(polyline(_steps([at[i] for i in best]), "front"))
    centres = spread([y for _, y in at], heights, TOP, height - FOOT)
    for i, ((x, y), centre, part) in enumerate(zip(at, centres, labels, strict=True)):
        css = "label strong" if i in best else "label muted"
        area.body.append(line(x + 6, y, area.x.stop + 22, centre, "leader"))
        area.body.append(lines_of_text(area.x.stop + 26, centre, part, "start", css))
    for i, (x, y) in enumerate(at):
        title = f"{names[i]}: {format_bytes(points[i][0])}, {points[i][1]:.4f}"
        area.body.append(circle(x, y, 5.5 if i in best else 4.5, "dot on" if i in best else "dot off", title))
    return canvas(height, area.body, label)


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    path = list(points[:1])
    for x, y in points[1:]:
        path += [(x, path[-1][1]), (x, y)]
    return path
