"""A step in a few hundred instants: no peak is lost, every phase is seen, a prediction lies in its place."""

from __future__ import annotations

import itertools

import torch

from lowmem.memory.trace.sampling import timeline as sampled
from lowmem.memory.trace.tracker import Tracker
from lowmem.report.charts import timeline


def stream(*phases: tuple[str, int]) -> Tracker:
    """Each phase makes and frees so many tensors, one after another; the second phase has a high instant."""
    tracker = Tracker()
    with tracker:
        for index, (name, count) in enumerate(phases):
            tracker.enter(name)
            for i in range(count):
                size = 1000 if (index, i) == (1, count // 2) else 10
                torch.empty(size, dtype=torch.uint8)
    tracker.stop()
    return tracker


def test_the_highest_instant_is_kept_and_phases_follow_each_other() -> None:
    tracker = stream(("forward", 400), ("loss backward", 333), ("optimizer step", 50_000))
    found = sampled(tracker, 100)
    totals = [sum(column) for column in zip(*found["bytes"].values(), strict=True)]
    assert max(totals) == tracker.peak().total == 1000
    phases = found["phases"]
    assert [p["name"] for p in phases] == ["forward", "loss backward", "optimizer step"]
    assert phases[0]["start"] == 0
    assert phases[-1]["stop"] == len(totals) - 1
    assert all(a["stop"] + 1 == b["start"] for a, b in itertools.pairwise(phases))
    assert phases[1]["start"] <= totals.index(1000) <= phases[1]["stop"]
    widths = [p["stop"] - p["start"] + 1 for p in phases]
    assert widths[2] <= len(totals) / 2  # although it has 98 % of the events
    assert min(widths) >= 20


def test_steps_inside_backward_are_not_phases_of_the_picture() -> None:
    parts = [(name, 3) for _ in range(50) for name in ("layers backward", "release step")]
    found = sampled(stream(("forward", 9), *parts))
    assert [p["name"] for p in found["phases"]] == ["forward", "layers backward"]


def test_an_empty_stream_has_one_instant() -> None:
    found = sampled(Tracker())
    assert [len(row) for row in found["bytes"].values()] == [1] * 6


def line(*phases: tuple[str, int, int]) -> dict[str, object]:
    count = phases[-1][2] + 1
    named = [{"name": n, "start": a, "stop": b} for n, a, b in phases]
    return {"bytes": {"weights": list(range(count))}, "phases": named}


def test_a_prediction_is_laid_over_phase_by_phase() -> None:
    ours = line(("forward", 0, 9), ("backward", 10, 29), ("optimizer step", 30, 99))
    theirs = line(("forward", 0, 4), ("clip", 5, 6), ("backward", 7, 8))
    placed = timeline._placed(theirs, timeline.total(theirs), ours)
    assert [value for _, value in placed] == list(range(9))
    at = {value: place for place, value in placed}
    assert (at[0], at[4], at[7], at[8]) == (0, 9, 10, 29)
    assert 9 <= at[5] <= at[6] <= 10  # a phase that we lack lies between its neighbours
    assert [place for place, _ in placed] == sorted(at.values())
    strange = line(("else", 0, 9))
    assert timeline._placed(strange, timeline.total(strange), ours)[-1] == (99.0, 9)
