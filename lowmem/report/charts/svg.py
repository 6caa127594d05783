"""The few shapes that the charts are made of, as SVG text, and the style sheet that colours them.

Colours are CSS classes, so that one picture serves light and dark pages. A label is never cut: its width is
estimated on the generous side, long ones are wrapped, and margins are made from what must fit in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import ParamSpec

CHAR = 6.9  # px per character of the 12 px page font, a little more than it takes
LINE = 15.0  # px from one line of a wrapped label to the next
WIDE, NARROW = 900.0, 340.0
"""Px of a picture on a screen, and on a telephone of 420 px, where it is drawn anew."""
_width: ContextVar[float] = ContextVar("width", default=WIDE)


P = ParamSpec("P")


def width() -> float:
    """Px that the picture under way may take."""
    return _width.get()


def narrow() -> bool:
    """Whether the picture under way is for a telephone."""
    return _width.get() == NARROW


def twice(draw: Callable[P, str]) -> Callable[P, str]:
    """A chart drawn for a screen and for a telephone; the page's style shows the one that fits."""

    @wraps(draw)
    def both(*args: P.args, **kwargs: P.kwargs) -> str:
        wide = draw(*args, **kwargs)
        before = _width.set(NARROW)
        try:
            return wide + draw(*args, **kwargs)
        finally:
            _width.reset(before)

    return both


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
    """Lines of at most `limit` characters, broken after spaces, marks and brackets."""
    lines: list[str] = []
    while len(label) > limit:
        cuts = (max(label.rfind(mark, 1, limit) + 1 for mark in marks) for marks in (", /-_", "("))
        cut = next((cut for cut in cuts if cut > limit // 3), limit)
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
        f'<svg class="{"narrow" if narrow() else "wide"}" viewBox="0 0 {width():.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(label)}" '
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


# Colours as variables: one set for light pages, one for dark.
STYLE = (
    """
:root{--bg:#ffffff;--panel:#f6f8fa;--ink:#1f2328;--soft:#59636e;--rule:#d1d9e0;--grid:#e6eaef;
--weights:#2f7d4f;--gradients:#2f6fb5;--optimizer_state:#c58a12;--activations:#c9502d;--logits:#b0468f;
--workspace:#7a62c2;--other:#8a8f98;--outside:#b9c0c9;--base:#5a7fa8;--saved:#bfe3c6;--cost:#d9776a;
--predicted:#9db8d6;--measured:#2f6fb5;--capacity:#c21f2f;--overlay:#111418;--front:#2f7d4f;
--ample:#bfe3c6;--tight:#f7dfa0;--thin:#f3b98c;--over:#eec3c3;--s0:#e3edf7;--s1:#bcd3ea;--s2:#8fb4da;
--s3:#5c8fc4;--s4:#34659b;
--p0:#f4f6f8;--p1:#eaeef2;--good:#1a7f37;--warn:#9a6700;--bad:#c21f2f;
--h0:#2f6fb5;--h1:#c9502d;--h2:#2f7d4f;--h3:#b0468f;--h4:#a87408;--h5:#7a62c2;--h6:#0d8a8a;--h7:#6b7280}
@media (prefers-color-scheme:dark){:root{--bg:#0f1319;--panel:#171d26;--ink:#e6edf3;--soft:#9aa6b2;
--rule:#343d49;--grid:#252d38;
--weights:#4fae77;--gradients:#5b9fe0;--optimizer_state:#dfa93a;--activations:#ea7a55;--logits:#d777b8;
--workspace:#a48cf0;--other:#8b95a1;--outside:#4b5665;--base:#5d86b5;--saved:#2c5c3b;--cost:#c2594d;
--predicted:#41648c;--measured:#6db0f2;--capacity:#ff6b78;--overlay:#ffffff;--front:#4fae77;
--ample:#1f5230;--tight:#665010;--thin:#74421a;--over:#6b2a2e;--s0:#182635;--s1:#1f3a58;--s2:#285280;
--s3:#3572b0;--s4:#4f97dd;
--p0:#141a22;--p1:#1a212b;--good:#4fc072;--warn:#e0b040;--bad:#ff7d86;
--h0:#6db0f2;--h1:#ea7a55;--h2:#4fae77;--h3:#d777b8;--h4:#dfa93a;--h5:#a48cf0;--h6:#3fc1c1;--h7:#a3acb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:1.5rem;margin:0 0 12px;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:34px 0 8px}
h3{font-size:.95rem;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:6px 0 12px}
.verdict{font-size:1.05rem;padding:12px 16px;border-left:5px solid var(--soft);background:var(--panel);
border-radius:4px}
.verdict.good{border-color:var(--good)}.verdict.warn{border-color:var(--warn)}
.verdict.bad{border-color:var(--bad)}
figure{margin:10px 0 18px;padding:12px;background:var(--panel);border:1px solid var(--rule);
border-radius:6px}
figcaption{color:var(--soft);font-size:.87rem;margin-top:6px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin-bottom:8px;font-size:.85rem}
.chip{display:inline-flex;align-items:center;gap:6px;white-space:nowrap}.chip svg{width:12px;height:12px}
.scroll{overflow-x:auto}.scroll>svg{display:block;width:100%;height:auto}.scroll>svg.narrow{display:none}
@media(max-width:760px){.scroll>svg.wide{display:none}.scroll>svg.narrow{display:block}
main{padding:14px 8px 40px}figure{padding:8px}
table.ranked,table.ranked tbody,table.ranked tr,table.ranked td{display:block;text-align:left}
table.ranked thead{display:none}table.ranked tr{padding:6px 0;border-bottom:1px solid var(--rule)}
table.ranked td{border:0;padding:1px 8px;white-space:normal;overflow-wrap:anywhere}
table.ranked td::before{content:attr(data-name) ": ";color:var(--soft)}}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin:6px 0 14px;
font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 8px;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600}.n,td.w{white-space:nowrap}th.n{white-space:normal}.n{text-align:right}
tr.good td:first-child{border-left:4px solid var(--good)}
tr.warn td:first-child{border-left:4px solid var(--warn)}
tr.bad td:first-child{border-left:4px solid var(--bad)}
ul{margin:6px 0 14px;padding-left:20px}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:12px;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
details{margin:18px 0;border-top:1px solid var(--rule);padding-top:10px}summary{cursor:pointer;
font-weight:600}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink)}
svg .tick,svg .axis,svg .muted{fill:var(--soft)}svg .strong{font-weight:600}
svg .label,svg .value{paint-order:stroke;stroke:var(--panel);stroke-width:4px;stroke-linejoin:round}
svg .capacity-text{fill:var(--capacity);font-weight:600}
.grid{stroke:var(--grid);stroke-width:1}.leader{stroke:var(--rule);stroke-width:1}
.capacity{stroke:var(--capacity);stroke-width:1.5;stroke-dasharray:6 4}.marker{stroke:var(--ink);
stroke-width:1}
.frontier{stroke:var(--ink);stroke-width:2.5}.curve{fill:none;stroke-width:1.8}
.front{fill:none;stroke:var(--front);stroke-width:1.8;stroke-dasharray:3 3}
.overlay{fill:none;stroke:var(--overlay);stroke-width:1.6;stroke-dasharray:5 3}
.dot.on{fill:var(--front)}.dot.off{fill:var(--h7)}
.faint{opacity:.45}mark{background:var(--saved);color:inherit;border-radius:2px}
.o1{stroke-dasharray:9 9}.o2{stroke-dasharray:5 13}.o3{stroke-dasharray:3 15}
.d1{stroke-dasharray:7 3}.d2{stroke-dasharray:2 3}
"""
    + "".join(
        f".c-{name}{{fill:var(--{name})}}"
        for name in (
            *(
                "weights",
                "gradients",
                "optimizer_state",
                "activations",
                "logits",
                "workspace",
                "other",
                "outside",
            ),
            *("base", "saved", "cost", "predicted", "measured"),
        )
    )
    + "".join(f".m-{name}{{fill:var(--{name})}}" for name in ("ample", "tight", "thin", "over"))
    + "".join(f".m-{i}{{fill:var(--s{i})}}" for i in range(5))
    + "svg .t-m-3,svg .t-m-4{fill:#fff}.phase0{fill:var(--p0)}.phase1{fill:var(--p1)}"
    ".l-overlay{fill:var(--overlay)}"
    + "".join(f".curve.h{i}{{stroke:var(--h{i})}}.dot.h{i}{{fill:var(--h{i})}}" for i in range(8))
    + "\n"
)
