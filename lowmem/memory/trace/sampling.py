"""A stream of births and deaths as a few hundred instants that a picture can show.

Each phase of the step is cut into stretches, and the highest instant of every stretch is kept: no peak is
lost. A phase with very many events (an optimizer step over small tensors) gets no more than a third of the
width, so that the others stay visible.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lowmem.memory.trace.tracker import CATEGORIES, Tracker

SAMPLES = 300
INSIDE = ("release step",)  # phases inside others, hundreds of them: not drawn on their own


def timeline(tracker: Tracker, samples: int = SAMPLES) -> dict[str, Any]:
    """Live bytes by category at about `samples` instants of a stream.

    Args:
        tracker: after the step.
        samples: how many instants; each phase has one at least.

    Returns:
        {"bytes": {category: [bytes]}, "phases": [{"name", "start", "stop"}]}, start and stop as indices.
    """
    heights = _heights(tracker)
    segments = _segments(tracker.phases, len(heights))
    widths = _widths([len(places) for _, places in segments])
    chosen: list[int] = []
    phases = []
    for (name, places), width in zip(segments, widths, strict=True):
        count = round(samples * width)
        start = len(chosen)
        chosen += [max(part, key=heights.__getitem__) for part in _parts(places, max(1, count))]
        phases.append({"name": name, "start": start, "stop": len(chosen) - 1})
    moments = tracker.at(chosen)
    rows = {key: [moment.bytes.get(key, 0) for moment in moments] for key in CATEGORIES}
    return {"bytes": rows, "phases": phases}


def _heights(tracker: Tracker) -> list[int]:
    """Live bytes before the first entry of the stream and after each."""
    total, heights = 0, [0]
    for entry in tracker.stream:
        total += tracker.sizes[entry - 1] if entry > 0 else -tracker.sizes[-entry - 1]
        heights.append(total)
    return heights


def _segments(phases: Sequence[tuple[int, str]], stop: int) -> list[tuple[str, range]]:
    """Places of each phase in the stream; neighbours of one name are one, empty ones are left out."""
    outer = [phase for phase in phases if phase[1] not in INSIDE] or [(0, "step")]
    found: list[tuple[str, range]] = []
    for i, (start, name) in enumerate(outer):
        end = outer[i + 1][0] + 1 if i + 1 < len(outer) else stop
        begin = found[-1][1].stop if found else start
        if found and found[-1][0] == name:
            found[-1] = (name, range(found[-1][1].start, max(end, begin)))
        elif end > begin:
            found.append((name, range(begin, end)))
    return found


def _widths(counts: Sequence[int]) -> list[float]:
    """Share of the picture for each phase: as its events, but none more than a third of all."""
    capped = [min(n, (sum(counts) - n) / 2) if len(counts) > 2 else n for n in counts]
    return [n / (sum(capped) or 1) for n in capped]


def _parts(places: range, count: int) -> Iterator[range]:
    """`places` in at most `count` parts of nearly the same length."""
    count = min(count, len(places))
    edges = [round(i * len(places) / count) for i in range(count + 1)]
    yield from (places[a:b] for a, b in itertools.pairwise(edges))
