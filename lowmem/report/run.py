"""What a fine-tuning run was: losses, answers, an example with its mask, data, memory, settings, command."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report import profile
from lowmem.report.charts.curves import Curve, curves
from lowmem.report.page import Cell, Figure, Report, Right, Section, Size, Table
from lowmem.report.plan import closing, subject
from lowmem.report.units import format_bytes

FORGETTING = "loss on general text"
SMOOTH = 12  # losses that are drawn as they are; more get a smoothed line beside them
KEEP = 0.8
"""What the smoothed line keeps of itself at each log."""


def build(data: Mapping[str, Any]) -> Report:
    """The page of a run: its results first, then its memory as a profile shows it, how to do it again."""
    result = data["result"]
    memory = profile.build(data) if data.get("measured") else None
    sections = [
        _losses(data),
        _results(result),
        _samples(result.get("samples") or ()),
        _example(data.get("example")),
        _data(result.get("data") or {}),
        *_memory(data, memory),
        *closing({"run": data.get("settings") or data.get("run"), "command": data.get("command")}),
    ]
    verdict, tone = say(data, memory)
    what = {"model": {"name": result["model"]}, "run": data.get("settings") or data.get("run")}
    return Report(
        f"Run of {result['strategy']}: {subject(what)}",
        verdict,
        tone,
        [s for s in sections if s is not None],
        data,
    )


def say(data: Mapping[str, Any], memory: Report | None) -> tuple[str, str]:
    """What came out, in one line, and its tone."""
    result = data["result"]
    if ruined := result.get("nonfinite_weights"):
        return f"Ruined: {len(ruined)} weight tensors hold numbers that are not finite; lower lr.", "bad"
    before, after = (result["held_out"].get(when) or {} for when in ("before", "after"))
    told = [f"Held-out {name} {_change(before.get(name), value)}." for name, value in after.items()]
    told.append(f"{result['steps']} steps.")
    if memory is not None:
        told.append(f"Peak {format_bytes(data['measured']['peak']['allocated'])} of tensors.")
    old, new = before.get("loss"), after.get("loss")
    worse = old is not None and "loss" in after and (new is None or new > old)  # None: not finite
    return " ".join(told), "warn" if worse or (memory is not None and memory.tone != "good") else "good"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "is not finite" if after is None else f"{after:.3f}"
    return f"{before:.3f} to {after:.3f}" + (f" ({after / before - 1:+.0%})" if before else "")


def _losses(data: Mapping[str, Any]) -> Section | None:
    """Losses by step: of training as logged and smoothed, of held-out rows, of general text."""
    log: Sequence[Mapping[str, Any]] = data.get("log") or ()
    trained = _points(log, "loss")
    smooth = len(trained) > SMOOTH
    series = [Curve("training", trained, "h0 faint" if smooth else "h0")]
    if smooth:
        series.append(Curve("training, smoothed", _smooth(trained), "h0"))
    result = data["result"]
    before, after = ((result["held_out"].get(when) or {}).get("loss") for when in ("before", "after"))
    series.append(Curve("held out", _with_ends(_points(log, "eval_loss"), before, after, result), "h1"))
    general = result.get("general") or {}
    series.append(
        Curve("general text", _with_ends([], general.get("before"), general.get("after"), result), "h2")
    )
    if not any(curve.points for curve in series):
        return None
    picture = curves(series, ("optimizer step", "loss, nats per token"), "Losses over the steps")
    return Section("Loss", figures=[Figure(picture)])


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(float(e["step"]), e[key]) for e in log if e.get(key) is not None]
    return [(step, float(value)) for step, value in found if math.isfinite(value)]


def _with_ends(
    between: Sequence[tuple[float, float]],
    before: float | None,
    after: float | None,
    result: Mapping[str, Any],
) -> list[tuple[float, float]]:
    """The evaluations of a run with those before and after it."""
    first = [] if before is None else [(0.0, float(before))]
    last = [] if after is None else [(float(result["steps"]), float(after))]
    return [*first, *between, *last]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean, started without bias."""
    total, weight, found = 0.0, 0.0, []
    for step, value in points:
        total, weight = KEEP * total + (1 - KEEP) * value, KEEP * weight + (1 - KEEP)
        found.append((step, total / weight))
    return found


def _results(result: Mapping[str, Any]) -> Section:
    before, after = (result["held_out"].get(when) or {} for when in ("before", "after"))
    rows: list[list[Cell]] = [
        [name, _number(before.get(name)), _number(value)] for name, value in after.items()
    ]
    rows = [[f"held-out {row[0]}", *row[1:]] for row in rows]
    general = result.get("general") or {}
    if general.get("after") is not None:
        rows.append([FORGETTING, _number(general.get("before")), _number(general["after"])])
    scored = (result.get("benchmarks") or {}).get("after") or {}
    first = (result.get("benchmarks") or {}).get("before") or {}
    rows += [[name, _number(first.get(name)), _number(value)] for name, value in scored.items()]
    tables = [Table(["measured", "before", "after"], rows)] if rows else []
    held: list[list[Cell]] = [["optimizer state", Size(result["state_bytes"])]]
    held += [
        [f"AdamW's with {dtype} moments", Size(size)]
        for dtype, size in (result.get("adamw_state_bytes") or {}).items()
    ]
    if result.get("peak_bytes"):
        held.append(["peak of the device", Size(result["peak_bytes"])])
    return Section("Results", tables=[*tables, Table(["bytes held", ""], held)])


def _number(value: float | None) -> Right:
    return Right("-" if value is None else f"{value:.4f}")


def _samples(samples: Sequence[Mapping[str, str]]) -> Section | None:
    rows = [[s["prompt"], s["before"], s["after"]] for s in samples]
    return Section("Answers", tables=[Table(["asked", "before", "after"], rows)]) if rows else None


def _example(example: Mapping[str, Any] | None) -> Section | None:
    """One row as the model saw it."""
    if not example:
        return None
    pieces, end = [], 0
    for start, stop in example["spans"]:
        pieces += [(example["text"][end:start], False), (example["text"][start:stop], True)]
        end = stop
    pieces.append((example["text"][end:], False))
    said = "The first row of the data."
    if example.get("tokens"):
        said = f"{example['tokens']} tokens; the loss counts the {example['trained']} of what is marked."
    return Section("One example, as the model sees it", said, marked=[piece for piece in pieces if piece[0]])


def _data(summary: Mapping[str, str]) -> Section | None:
    names = {"train": "trained on", "held_out": "held out"}
    points = [f"{names.get(key, key)}: {text}" for key, text in summary.items()]
    return Section("Data", points=points) if points else None


def _memory(data: Mapping[str, Any], memory: Report | None) -> list[Section]:
    """What the profile of the run shows, under a heading of its own; settings and command come once."""
    if memory is None:
        return []
    parts = [section for section in memory.sections if section.title not in ("Settings", "Command")]
    return [Section("Memory", memory.verdict), *parts]
