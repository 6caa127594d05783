"""What a profile shows: predicted beside measured, one step over time, and who holds the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report.charts.bars import CATEGORIES, bars, pairs, words
from lowmem.report.charts.curves import Curve, curves
from lowmem.report.charts.timeline import picture
from lowmem.report.page import Cell, Figure, Percent, Report, Section, Size, Table
from lowmem.report.plan import LEGEND, closing, peak_bar, subject
from lowmem.report.units import format_bytes, format_percent, unit

FLAG = 3.0  # percent of the peak beyond which a prediction is called off
MODULES = 20


def rows_of(entry: Mapping[str, Any]) -> dict[str, int]:
    """The bytes of a plan or a measurement by row: state, each category at the peak, each peak."""
    peaks = {f"peak_{key}": size for key, size in entry["peak"].items() if size is not None}
    return {"state_bytes": entry["state_bytes"], **entry["at_peak"], **peaks}


def errors(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float | None]:
    """100 (predicted - measured) / measured for each row both know; None where only one is zero."""
    ours, theirs = rows_of(predicted), rows_of(measured)
    return {key: _error(ours[key], size) for key, size in theirs.items() if key in ours}


def _error(predicted: int, measured: int) -> float | None:
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return 100.0 * (predicted - measured) / measured


def build(data: Mapping[str, Any]) -> Report:
    """The report of a profile document."""
    predicted, measured = data.get("predicted"), data["measured"]
    verdict, tone = say(data)
    sections = [
        _against(predicted, measured, data.get("error_percent") or {}),
        _at_peak(predicted, measured, data.get("budget_bytes")),
        _timeline(predicted, measured),
        _modules(measured),
        _steps(data.get("steps") or ()),
        _beside(data),
        Section("Advice", points=data["advice"]) if data.get("advice") else None,
        *closing(data),
    ]
    name = f"{measured['strategy']}: {subject(data)}"
    return Report(f"Memory profile of {name}", verdict, tone, [s for s in sections if s is not None], data)


def say(data: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict in one line, and its tone."""
    measured, predicted = data["measured"], data.get("predicted")
    peak = measured["peak"]["allocated"]
    where = f"Measured peak {format_bytes(peak)} of tensors at {words(measured['event'])}"
    if data.get("out_of_memory"):
        return f"Out of memory. {where}, before the request that failed.", "bad"
    if predicted is None:
        return f"{where}; nothing was predicted for this run.{_fit(data)}", "plain"
    error = (data.get("error_percent") or {}).get("peak_allocated")
    said = f"{where}; predicted {format_bytes(predicted['peak']['allocated'])} ({format_percent(error)})."
    exact = measured["state_bytes"] == predicted["state_bytes"]
    state = (
        "Optimizer state is as predicted to the byte."
        if exact
        else "Optimizer state differs from the prediction."
    )
    off = error is None or abs(error) > FLAG
    return f"{said} {state}{_fit(data)}", "warn" if off or not exact else "good"


def _fit(data: Mapping[str, Any]) -> str:
    budget, head = data.get("budget_bytes"), data["measured"].get("headroom_bytes")
    if budget is None or head is None:
        return ""
    return (
        f" {format_bytes(budget)} leave {format_bytes(head)} free."
        if head >= 0
        else (f" {format_bytes(budget)} were exceeded by {format_bytes(-head)}.")
    )


def _against(
    predicted: Mapping[str, Any] | None, measured: Mapping[str, Any], error: Mapping[str, float | None]
) -> Section:
    ours = rows_of(measured)
    if predicted is None:
        rows: list[list[Cell]] = [[words(key), Size(size)] for key, size in ours.items()]
        return Section("Measured", tables=[Table(["row", "measured"], rows)])
    theirs = rows_of(predicted)
    rows = [
        [
            words(key),
            Size(theirs.get(key)),
            Size(size),
            Size(_difference(theirs.get(key), size), signed=True),
            Percent(error.get(key)),
        ]
        for key, size in ours.items()
    ]
    table = Table(["row", "predicted", "measured", "predicted - measured", "error"], rows)
    legend = [("c-predicted", "predicted"), ("c-measured", "measured")]
    return Section(
        "Predicted against measured", figures=[Figure(pairs(theirs, ours, error), legend)], tables=[table]
    )


def _difference(predicted: int | None, measured: int) -> int | None:
    return None if predicted is None else predicted - measured


def _at_peak(predicted: Mapping[str, Any] | None, measured: Mapping[str, Any], budget: int | None) -> Section:
    rows = [peak_bar(measured, "measured")]
    if predicted is not None:
        device = predicted["peak"].get("device") if measured["peak"].get("device") else None
        rows.insert(0, peak_bar({**predicted, "peak": {**predicted["peak"], "device": device}}, "predicted"))
    figure = Figure(bars(rows, "Bytes at the peak instant by category", budget), LEGEND)
    return Section("At the peak", "One instant, so the pieces add up to the peak.", [figure])


def _timeline(predicted: Mapping[str, Any] | None, measured: Mapping[str, Any]) -> Section | None:
    timeline = measured.get("timeline")
    if not timeline:
        return None
    overlay = (predicted or {}).get("timeline")
    legend = [*LEGEND[:-1], *([("l-overlay", "predicted total (dashed)")] if overlay else [])]
    return Section(
        "One step",
        "Live bytes of the profiled step, as tracked.",
        [Figure(picture(timeline, overlay), legend)],
    )


def _modules(measured: Mapping[str, Any]) -> Section | None:
    modules: Sequence[Mapping[str, Any]] = measured.get("modules") or ()
    if not modules:
        return None
    shown = list(modules[:MODULES])
    rest = {key: sum(m["bytes"].get(key, 0) for m in modules[MODULES:]) for key in CATEGORIES}
    if len(modules) > MODULES:
        shown.append({"kind": f"{len(modules) - MODULES} more kinds", "bytes": rest})
    rows = [
        [m["kind"], Size(sum(m["bytes"].values())), *(Size(m["bytes"].get(k, 0)) for k in CATEGORIES)]
        for m in shown
    ]
    text = "Bytes alive at the peak, by the module they belong to or were made in; * stands for all layers."
    return Section("By module", text, tables=[Table(["module", "all", *map(words, CATEGORIES)], rows)])


def _steps(steps: Sequence[Mapping[str, Any]]) -> Section | None:
    keys = [
        k for k in ("allocated", "peak", "reserved", "resident") if any(s.get(k) is not None for s in steps)
    ]
    if len(steps) < 2 or not keys:
        return None
    name, step = unit(max(s[k] for s in steps for k in keys if s.get(k) is not None))
    series = [
        Curve(_NAMES[k], [(float(s["step"]), s[k] / step) for s in steps if s.get(k) is not None])
        for k in keys
    ]
    figure = Figure(
        curves(series, ("step", f"bytes, {name}"), "Memory at the end of each step", zero=True),
        caption=_STEPS,
    )
    return Section("Over the run", figures=[figure])


_NAMES = {
    "allocated": "allocated",
    "peak": "peak allocated",
    "reserved": "reserved",
    "resident": "resident (process)",
}
_STEPS = (
    "Read at the end of each step. Resident memory is that of the whole process, libraries and data included."
)


def _beside(data: Mapping[str, Any]) -> Section | None:
    beside = data["measured"].get("beside") or {}
    rows = [[words(key), Size(value) if key not in _COUNTS else value] for key, value in beside.items()]
    if not rows:
        return None
    text = (
        "Sources other than the tracker. Unattributed: what the allocator saw at its peak and the tracker "
        "did not (kernel workspaces)."
    )
    return Section("Beside the tracker", text, tables=[Table(["what", "value"], rows)])


_COUNTS = ("allocation_retries", "out_of_memory_errors")
