"""The few shapes that the charts are made of, as SVG text.

Colours are CSS classes, so that one picture serves light and dark pages. A label is never cut: its width is
estimated on the generous side, long ones are wrapped, and margins are made from what must fit in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

CHAR = 6.9  # px per character of the 12 px page font, a little more than it takes
LINE = 15.0  # px from one line of a wrapped label to the next
WIDTH = 900.0


@dataclass(frozen=True)
class Scale:
    """Linear map from [low, high] to [start, stop] px."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Position of `value`."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.stop - self.start)


def text_width(text: str) -> float:
    """Px that `text` may take, on the generous side."""
    return len(text) * CHAR


def wrap(label: str, limit: int = 34) -> list[str]:
    """Lines of at most `limit` characters, broken after a comma, space, slash, dash or underscore."""
    lines: list[str] = []
    while len(label) > limit:
        cut = max((label.rfind(mark, 1, limit) + 1 for mark in ", /-_("), default=0)
        cut = cut if cut > limit // 3 else limit
        lines.append(label[:cut].rstrip())
        label = label[cut:].lstrip()
    return [*lines, label]


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    """One line of text whose baseline starts, centres or ends at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(content)}</text>'


def lines_of_text(x: float, middle: float, lines: Sequence[str], anchor: str = "start", css: str = "") -> str:
    """Several lines, centred vertically on `middle`."""
    top = middle - (len(lines) - 1) * LINE / 2 + 4
    return "".join(text(x, top + i * LINE, line, anchor, css) for i, line in enumerate(lines))


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    """A filled box; `title` is its tooltip and what a screen reader says."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}"'
    return f'<rect {place} class="{css}">{inner}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def polyline(points: Iterable[tuple[float, float]], css: str) -> str:
    """An open broken line."""
    return f'<polyline points="{_points(points)}" class="{css}"/>'


def polygon(points: Iterable[tuple[float, float]], css: str, title: str = "") -> str:
    """A closed filled shape."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<polygon points="{_points(points)}" class="{css}">{inner}</polygon>'


def circle(x: float, y: float, radius: float, css: str, title: str = "") -> str:
    """A dot with a tooltip."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{css}">{inner}</circle>'


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def canvas(height: float, body: Sequence[str], label: str) -> str:
    """The finished picture; `label` says what it shows to whoever cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres nearest to `wanted` so that boxes of `heights` px do not overlap inside [low, high].

    Boxes keep their order; where the room does not suffice they run past `high`, never over each other.

    >>> spread([10.0, 11.0], [10.0, 10.0], 0.0, 100.0)
    [5.0, 15.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    centres = [0.0] * len(wanted)
    edge = high
    for i in reversed(order):
        centres[i] = min(wanted[i], edge - heights[i] / 2)
        edge = centres[i] - heights[i] / 2
    edge = low
    for i in order:
        centres[i] = max(centres[i], edge + heights[i] / 2)
        edge = centres[i] + heights[i] / 2
    return centres
