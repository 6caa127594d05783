"""What a watched step took, with the keys of one plan, so that the two subtract."""

from __future__ import annotations

from typing import Any

import torch

from lowmem.memory.device import readings as device_memory
from lowmem.memory.measure import watch
from lowmem.memory.measure.watch import Watch
from lowmem.memory.trace.sampling import timeline


def measure(done: Watch, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One entry with the plan's keys from a finished watch.

    Args:
        done: the watch of one step.
        optimizer: whose state it held.
    """
    tracker = done.tracker
    moments = tracker.moments()
    peak = max(moments.values(), key=lambda moment: moment.total)
    strategy = getattr(optimizer, "strategy", None)
    seen = device_memory.beside(tracker.device, peak.total)
    at_peak = dict(peak.bytes)
    if (more := seen.get("unattributed")) is not None:
        at_peak["unattributed"] = more
    return {
        "strategy": getattr(strategy, "name", type(optimizer).__name__),
        "options": dict(getattr(strategy, "options", {})),
        "state_bytes": watch.held_bytes(optimizer),
        "at_peak": at_peak,
        "peak": {
            "allocated": sum(at_peak.values()),
            "reserved": seen.get("reserved_peak"),
            "device": seen.get("device_used"),
        },
        "event": peak.event,
        "events": {name: moment.total for name, moment in moments.items()},
        "certainty": dict.fromkeys(at_peak, "measured"),
        "fits": None,
        "headroom_bytes": None,
        "why": [f"Measured: the highest instant is in the phase '{peak.event}'."],
        "timeline": timeline(tracker),
        "modules": watch.modules(tracker, peak),
        "beside": seen,
        "batch": done.batch,
        "device": tracker.device,
    }
