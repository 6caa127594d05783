"""One step over time: live bytes stacked by category, phases as bands, another timeline drawn over it.

Both clocks count allocator events, not seconds. Two timelines are laid over each other phase by phase, as
far as they have the same phases, otherwise end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from lowmem.report.charts.bars import CATEGORIES, words
from lowmem.report.charts.curves import upright
from lowmem.report.charts.svg import (
    Scale,
    canvas,
    line,
    narrow,
    polygon,
    polyline,
    rect,
    text,
    text_width,
    twice,
    width,
)
from lowmem.report.units import format_bytes, format_ticks, nice_ticks, unit

STEP = "optimizer step"
HEIGHT, TOP, FOOT = 400.0, 34.0, 40.0


def total(timeline: Mapping[str, Any]) -> list[int]:
    """Live bytes at each instant."""
    return [sum(column) for column in zip(*timeline["bytes"].values(), strict=True)]


@twice
def picture(
    timeline: Mapping[str, Any], overlay: Mapping[str, Any] | None = None, capacity: float | None = None
) -> str:
    """Stacked areas of one step, with the total of `overlay` as a line.

    Args:
        timeline: {"bytes": {category: [bytes]}, "phases": [{"name", "start", "stop"}]}.
        overlay: another one, say the prediction.
        capacity: bytes of a dashed line, drawn where it lies inside the picture.
    """
    sums = total(timeline)
    over = total(overlay) if overlay else []
    _, step = unit(max([*sums, *over]))
    name = unit(max([*sums, *over]))[0]
    ticks = nice_ticks(max([*sums, *over]) / step)
    labels = format_ticks(ticks)
    left = 36 + max(text_width(n) for n in labels)
    x = Scale(0, max(len(sums) - 1, 1), left, width() - 12)
    y = Scale(0, ticks[-1] * step, HEIGHT - FOOT, TOP)
    body = _phases(timeline, x)
    body += [line(left, y(v * step), x.stop, y(v * step), "grid") for v in ticks]
    body += [text(left - 8, y(v * step) + 4, n, "end", "tick") for v, n in zip(ticks, labels, strict=True)]
    body += _areas(timeline, x, y)
    if overlay:
        body.append(polyline([(x(at), y(v)) for at, v in _placed(overlay, over, timeline)], "overlay"))
    if capacity is not None and capacity <= y.high:
        body.append(line(left, y(capacity), x.stop, y(capacity), "capacity"))
    body += _peak(sums, timeline.get("phases", ()), x, y)
    body += [upright(12, (TOP + HEIGHT - FOOT) / 2, f"live bytes, {name}")]
    body += [
        text(
            (left + x.stop) / 2,
            HEIGHT - 6,
            "one step, in order" if narrow() else "allocations and releases of one step, in order",
            "middle",
            "axis",
        )
    ]
    return canvas(HEIGHT, body, "Live bytes over one training step, by category")


def _areas(timeline: Mapping[str, Any], x: Scale, y: Scale) -> list[str]:
    keys = [k for k in CATEGORIES if k in timeline["bytes"]]
    keys += [k for k in timeline["bytes"] if k not in CATEGORIES]
    count = len(next(iter(timeline["bytes"].values())))
    floor, shapes = [0.0] * count, []
    for key in keys:
        roof = [low + size for low, size in zip(floor, timeline["bytes"][key], strict=True)]
        if any(timeline["bytes"][key]):
            upper = [(x(i), y(v)) for i, v in enumerate(roof)]
            lower = [(x(i), y(v)) for i, v in reversed(list(enumerate(floor)))]
            css = f"c-{key}" if key in CATEGORIES else "c-other"
            shapes.append(
                polygon(
                    [*upper, *lower],
                    css,
                    f"{words(key)}, at most {format_bytes(max(timeline['bytes'][key]))}",
                )
            )
        floor = roof
    return shapes


def _phases(timeline: Mapping[str, Any], x: Scale) -> list[str]:
    """Bands, with names as far as there is room; the others keep theirs as a tooltip.

    The optimizer's step comes first, which is a few events only, then the widest.
    """
    body: list[str] = []
    taken: list[tuple[float, float]] = []
    phases = list(enumerate(timeline.get("phases", ())))
    for i, phase in sorted(
        phases, key=lambda item: (item[1]["name"] != STEP, item[1]["start"] - item[1]["stop"])
    ):
        name, start, stop = words(phase["name"]), x(phase["start"]), x(phase["stop"])
        body.append(rect(start, TOP, stop - start, HEIGHT - FOOT - TOP, f"phase{i % 2}", name))
        half = text_width(name) / 2
        middle = min(max((start + stop) / 2, x.start + half), x.stop - half)
        if all(middle + half + 6 <= low or middle - half - 6 >= high for low, high in taken):
            body.append(text(middle, HEIGHT - FOOT + 14, name, "middle", "tick"))
            taken.append((middle - half, middle + half))
    return body


def _placed(
    overlay: Mapping[str, Any], sums: Sequence[int], timeline: Mapping[str, Any]
) -> list[tuple[float, int]]:
    """Positions of the overlay's samples on the clock of `timeline`, phase by phase where names agree."""
    theirs, ours = overlay.get("phases", []), timeline.get("phases", [])
    last = max(len(total(timeline)) - 1, 0)
    spans = _spans([p["name"] for p in theirs], ours, last)
    if not spans:
        scale = Scale(0, max(len(sums) - 1, 1), 0, max(last, 1))
        return [(scale(i), v) for i, v in enumerate(sums)]
    placed = []
    for phase, (start, stop) in zip(theirs, spans, strict=True):
        scale = Scale(phase["start"], max(phase["stop"], phase["start"] + 1), start, stop)
        placed += [(scale(i), sums[i]) for i in range(phase["start"], min(phase["stop"] + 1, len(sums)))]
    return placed


def _spans(names: Sequence[str], ours: Sequence[Mapping[str, Any]], last: int) -> list[tuple[float, float]]:
    """Where each phase of the other timeline lies on ours; one that we lack lies between its neighbours."""
    blocks = SequenceMatcher(None, names, [p["name"] for p in ours], autojunk=False).get_matching_blocks()
    same = {b.a + i: ours[b.b + i] for b in blocks for i in range(b.size)}
    if not same:
        return []
    spans = []
    for i in range(len(names)):
        before = max((k for k in same if k <= i), default=None)
        after = min((k for k in same if k >= i), default=None)
        if i in same:
            spans.append((float(same[i]["start"]), float(same[i]["stop"])))
        else:
            start = 0.0 if before is None else float(same[before]["stop"])
            spans.append((start, float(last) if after is None else float(same[after]["start"])))
    return spans


def _peak(sums: Sequence[int], phases: Sequence[Mapping[str, Any]], x: Scale, y: Scale) -> list[str]:
    at = max(range(len(sums)), key=sums.__getitem__)
    where = [words(p["name"]) for p in phases if p["start"] <= at <= p["stop"]]
    words_ = f"peak {format_bytes(sums[at])}" + (f", {where[0]}" if where else "")
    half = text_width(words_) / 2
    middle = min(max(x(at), x.start + half), x.stop - half)
    return [
        line(x(at), y(sums[at]), x(at), TOP - 8, "marker"),
        text(middle, TOP - 14, words_, "middle", "value"),
    ]
