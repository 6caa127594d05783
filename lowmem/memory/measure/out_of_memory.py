"""What to say when memory runs out: who held the bytes, and what the plan would change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem.errors import UserError
from lowmem.memory.device import readings as device_memory
from lowmem.memory.measure import watch
from lowmem.memory.measure.measured import measure
from lowmem.report.bars import CATEGORIES, words
from lowmem.report.units import format_bytes

if TYPE_CHECKING:
    from lowmem.memory.measure.profile import Profile, Profiler


def explain(
    profiler: Profiler,
    running: watch.Watch | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    error: BaseException,
) -> UserError:
    """Write the report beside the run's results and make the error that names it.

    Args:
        profiler: whose run failed.
        running: the watch, if the step was tracked.
        model: the model in training.
        optimizer: its optimizer.
        error: what the allocator said.
    """
    if running is not None:
        running.tracker.stop()
        measured = measure(running, optimizer)
    else:
        measured = held(model, optimizer)
    profile = profiler._profile(measured, out_of_memory=True)
    where = _write(profiler, profile, measured)
    rows = ", ".join(f"{words(k)} {format_bytes(v)}" for k, v in measured["at_peak"].items() if v)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    tips = " ".join(profile.to_dict()["advice"])
    return UserError(f"out of memory in step {profiler._count}: {first} Held: {rows}. {tips}{where}")


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An entry with the plan's keys from what can still be told apart in a step that was not tracked."""
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


def _write(profiler: Profiler, profile: Profile, measured: Mapping[str, Any]) -> str:
    if profiler.folder is None:
        return ""
    from lowmem import report

    profiler.folder.mkdir(parents=True, exist_ok=True)
    data = profile.to_dict()
    (profiler.folder / "out_of_memory.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    page = report.write(data, profiler.folder / "out_of_memory.html")
    if measured["beside"].get("allocator_peak") is not None:
        device_memory.dump(profiler.folder / "out_of_memory.pickle")
    return f" The table is in {page}."
