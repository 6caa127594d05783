"""A trace and a strategy's footprint, put together: bytes at every event, and which event binds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowmem.memory.footprint import Footprint
from lowmem.memory.trace.extrapolate import kind
from lowmem.memory.trace.replica import Trace
from lowmem.memory.trace.tracker import CATEGORIES, Moment

STEP, RELEASE = "optimizer step", "release step"


@dataclass(frozen=True)
class Peak:
    """The binding event and its bytes by category, and every event's total."""

    event: str
    at_peak: Mapping[str, int]
    events: Mapping[str, int]

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.at_peak.values())


def combine(trace: Trace, held: Footprint) -> Peak:
    """The peak of a step from the second on, when optimizer state exists.

    Args:
        trace: of the model.
        held: of the strategy.
    """
    moments = {name: _with(m, held.held, 0) for name, m in trace.moments.items()}
    if STEP in trace.moments:
        moments[STEP] = _with(trace.moments[STEP], held.held, held.worst)
    scratch = {kind(name): size for name, size in held.scratch.items()}
    steps = [_with(m, held.held, scratch.get(kind(name), 0)) for name, m in trace.releases.items()]
    if steps:
        moments[RELEASE] = max(steps, key=lambda m: m.total)
    binding = max(moments, key=lambda name: moments[name].total)
    totals = {name: m.total for name, m in moments.items()}
    return Peak(binding, {k: moments[binding].bytes.get(k, 0) for k in CATEGORIES}, totals)


def _with(moment: Moment, state: int, workspace: int) -> Moment:
    more = dict(moment.bytes)
    more["optimizer_state"] = more.get("optimizer_state", 0) + state
    more["workspace"] = more.get("workspace", 0) + workspace
    return Moment(moment.event, more, moment.at)
