"""What a comparison shows: the loss each strategy reaches, the memory it takes, and which nothing beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report.charts.bars import bars
from lowmem.report.charts.curves import Curve, curves, front, pareto
from lowmem.report.page import Cell, Figure, Percent, Report, Right, Section, Size, Table
from lowmem.report.plan import LEGEND, closing, labels, peak_bar, subject
from lowmem.report.units import format_bytes


def build(data: Mapping[str, Any]) -> Report:
    """The report of a comparison document."""
    runs: Sequence[Mapping[str, Any]] = data["runs"]
    names = labels(runs, whole=True)
    verdict, tone = say(runs, names)
    sections = [
        _table(runs, names),
        _front(runs, names),
        _loss(runs, names),
        _at_peak(runs, names),
        _failures(runs, names),
        *closing(data),
    ]
    return Report(f"Comparison: {subject(data)}", verdict, tone, [s for s in sections if s is not None], data)


def usable(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Runs that finished with a finite loss and a measured peak."""
    return [
        i
        for i, run in enumerate(runs)
        if run["status"] == "done" and _finite(run.get("loss_after")) and run.get("measured")
    ]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def best(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """The Pareto front: runs that no other beats in peak bytes and held-out loss, by bytes."""
    kept = usable(runs)
    return [kept[i] for i in front([(_peak(runs[k]), runs[k]["loss_after"]) for k in kept])]


def _peak(run: Mapping[str, Any]) -> int:
    return int(run["measured"]["peak"]["allocated"])


def say(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[str, str]:
    """The verdict in one line, and its tone."""
    on = best(runs)
    failed = sum(run["status"] == "failed" for run in runs)
    tail = f" {failed} of {len(runs)} failed." if failed else ""
    if not on:
        return f"No run finished with a finite loss.{tail}", "bad"
    low, high = on[0], on[-1]
    if low == high:
        peak, loss = format_bytes(_peak(runs[low])), runs[low]["loss_after"]
        text = f"{names[low]} takes least memory ({peak}) and has the lowest held-out loss ({loss:.4f})."
    else:
        text = (
            f"Lowest held-out loss: {names[high]}, {runs[high]['loss_after']:.4f} "
            f"at {format_bytes(_peak(runs[high]))}. "
            f"Least memory: {names[low]}, {format_bytes(_peak(runs[low]))} at {runs[low]['loss_after']:.4f}."
        )
    return text + tail, "warn" if failed else "good"


def _table(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section:
    on = set(best(runs))
    order = sorted(range(len(runs)), key=lambda i: (i not in usable(runs), runs[i].get("loss_after") or 0.0))
    columns = [
        "strategy",
        "held-out loss",
        "before",
        "optimizer state",
        "peak, measured",
        "peak, predicted",
        "error",
    ]
    forgets = any(run.get("general_after") is not None for run in runs)
    names_of = list(dict.fromkeys(name for run in runs for name in run.get("benchmarks") or ()))
    columns[2:2] = [*(["general text"] if forgets else []), *names_of]
    rows: list[list[Cell]] = []
    for i in order:
        run = runs[i]
        measured, predicted = run.get("measured"), run.get("predicted")
        row: list[Cell] = [
            names[i],
            _loss_of(run),
            *_beside(run, forgets, names_of),
            _number(run.get("loss_before")),
        ]
        row += [Size(measured["state_bytes"] if measured else None), Size(_peak(run) if measured else None)]
        row += [Size(predicted["peak"]["allocated"] if predicted else None)]
        row += [Percent((run.get("error_percent") or {}).get("peak_allocated"))]
        rows.append([*row, _seconds(run.get("seconds_per_step")), "yes" if i in on else ""])
    marks = ["bad" if runs[i]["status"] == "failed" else "good" if i in on else "" for i in order]
    text = "On the front: no other run has both a lower loss and a smaller peak."
    return Section("Strategies", text, tables=[Table([*columns, "time per step", "front"], rows, marks)])


def _beside(run: Mapping[str, Any], forgets: bool, benchmarks: Sequence[str]) -> list[Cell]:
    """The loss on general text with what it changed by, and scores; where they were asked for."""
    before, after = run.get("general_before"), run.get("general_after")
    told = "-" if before is None or after is None else f"{after:.4f} ({after - before:+.4f})"
    scores = run.get("benchmarks") or {}
    return [*([Right(told)] if forgets else []), *(_number(scores.get(name)) for name in benchmarks)]


def _loss_of(run: Mapping[str, Any]) -> Right:
    return _number(run.get("loss_after")) if run["status"] == "done" else Right("failed")


def _number(value: float | None) -> Right:
    return Right("-" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite")


def _seconds(value: float | None) -> Right:
    return Right("-" if value is None else f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms")


def _front(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section | None:
    kept = usable(runs)
    if not kept:
        return None
    points = [(float(_peak(runs[i])), float(runs[i]["loss_after"])) for i in kept]
    svg = pareto(
        [names[i] for i in kept],
        points,
        ("measured peak", "held-out loss"),
        "Held-out loss against peak memory",
    )
    legend = [("dot on", "on the front"), ("dot off", "beaten by another")]
    return Section("Loss against memory", figures=[Figure(svg, legend, "Lower and further left is better.")])


def _loss(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section | None:
    series = []
    for run, name in zip(runs, names, strict=True):
        points = [(float(p["step"]), float(p["loss"])) for p in run.get("curve") or () if _finite(p["loss"])]
        series.append(Curve(name, points))
    if not any(curve.points for curve in series):
        return None
    return Section(
        "Held-out loss",
        figures=[Figure(curves(series, ("step", "held-out loss"), "Held-out loss over steps"))],
    )


def _at_peak(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section | None:
    kept = sorted((i for i, run in enumerate(runs) if run.get("measured")), key=lambda i: _peak(runs[i]))
    if not kept:
        return None
    rows = [peak_bar(runs[i]["measured"], names[i]) for i in kept]
    text = "Measured, one instant; the pieces add up to the peak."
    return Section(
        "At the peak", text, [Figure(bars(rows, "Measured bytes at the peak by category"), LEGEND)]
    )


def _failures(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section | None:
    rows = [
        [name, str(run.get("reason") or "unknown")]
        for run, name in zip(runs, names, strict=True)
        if run["status"] == "failed"
    ]
    return Section("What failed", tables=[Table(["strategy", "reason"], rows)]) if rows else None
