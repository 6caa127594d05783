"""What to say when memory runs out: who held the bytes, and what the plan would change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.errors import UserError
from lowmem.memory.device import readings as device_memory
from lowmem.memory.measure import watch
from lowmem.memory.measure.measured import measure
from lowmem.report.charts.bars import CATEGORIES, words
from lowmem.report.units import format_bytes


def explain(
    document: Mapping[str, Any],
    measured: Mapping[str, Any],
    step: int,
    folder: Path | None,
    error: BaseException,
) -> UserError:
    """Write the report beside the run's results and make the error that names it.

    Args:
        document: the profile of the run that failed, as a document.
        measured: the entry of its last step, from `held`.
        step: which step failed, from 1.
        folder: where to leave the report; None leaves none.
        error: what the allocator said.
    """
    where = _write(document, measured, folder)
    rows = ", ".join(f"{words(k)} {format_bytes(v)}" for k, v in measured["at_peak"].items() if v)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    tips = " ".join(document["advice"])
    return UserError(f"out of memory in step {step}: {first} Held: {rows}. {tips}{where}")


def held(running: watch.Watch | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An entry with the plan's keys: the tracked step so far, or what can still be told apart without one."""
    if running is None:
        return _untracked(model, optimizer)
    running.tracker.stop()
    return measure(running, optimizer)


def _untracked(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    device = next(model.parameters()).device.type
    tracker = watch.Watch(model, optimizer)
    tracker._register()
    at_peak = dict.fromkeys(CATEGORIES, 0) | dict(tracker.tracker.at([len(tracker.tracker.stream)])[0].bytes)
    tracker.tracker.stop()
    reading = device_memory.reading(device)
    if reading["peak"] is not None:  # the rest of the peak cannot be told apart any more
        at_peak["activations_and_others"] = max(0, reading["peak"] - sum(at_peak.values()))
    strategy = getattr(optimizer, "strategy", None)
    return {
        "strategy": getattr(strategy, "name", type(optimizer).__name__),
        "options": dict(getattr(strategy, "options", {})),
        "state_bytes": watch.held_bytes(optimizer),
        "at_peak": at_peak,
        "peak": {"allocated": sum(at_peak.values()), "reserved": reading["reserved"], "device": None},
        "event": "out of memory",
        "events": {},
        "certainty": dict.fromkeys(at_peak, "measured"),
        "fits": False,
        "headroom_bytes": None,
        "why": ["Memory ran out in a step that was not tracked: only what outlives a step is told apart."],
        "beside": device_memory.beside(device, sum(at_peak.values())),
        "batch": {},
        "device": device,
    }


def _write(document: Mapping[str, Any], measured: Mapping[str, Any], folder: Path | None) -> str:
    if folder is None:
        return ""
    from lowmem import report

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out_of_memory.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    page = report.write(document, folder / "out_of_memory.html")
    if measured["beside"].get("allocator_peak") is not None:
        device_memory.dump(folder / "out_of_memory.pickle")
    return f" The table is in {page}."
