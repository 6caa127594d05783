"""Peak bytes over sequence length and batch size, without a trace for each cell.

Where closed forms describe the model they are used. Elsewhere, at each length, shallow traces of a few batch
sizes; between them every category of every event goes by a line, which it is as long as the same instant of
an event is its largest. Of the chunked loss a tile grows with the batch up to so many tokens, and no further:
there is a trace where it is full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.memory import closed_form
from lowmem.memory.between import above
from lowmem.memory.footprint import STEP, Footprint, Peak, combine
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.memory.trace.replica import Trace
from lowmem.memory.trace.tracker import Moment
from lowmem.memory.trace.windows import special

BATCHES = (1, 4, 32)
"""Those that are traced; beyond them the last line goes on."""
CHUNK = 4096  # tokens of a tile of the chunked loss


@dataclass(frozen=True)
class Surface:
    """Peaks of one strategy at any batch size and sequence length.

    Args:
        config: of the model; run: all options but batch_size and seq_len; held: what the strategy adds.
    """

    config: Any
    run: Run
    held: Footprint

    def peak(self, batch_size: int, seq_len: int) -> int:
        """Allocated bytes at the peak."""
        run = replace(self.run, batch_size=batch_size, seq_len=seq_len)
        if formal(self.config, run, self.held):
            return formula(self.config, run, self.held)[1]
        found = self._trace(batch_size, seq_len)
        return combine(found, self.held, above(self.config, run, found, self.held)).allocated

    def _trace(self, batch_size: int, seq_len: int) -> Trace:
        sizes = traced_sizes(self.run, seq_len)
        if batch_size in sizes:
            return self._traced(batch_size, seq_len)
        after = min(max(1, bisect_left(sizes, batch_size)), len(sizes) - 1)
        low, high = sizes[after - 1], sizes[after]
        a, b = self._traced(low, seq_len), self._traced(high, seq_len)
        share = (batch_size - low) / (high - low)
        return replace(
            b, moments=_line(a.moments, b.moments, share), releases=_line(a.releases, b.releases, share)
        )

    def _traced(self, batch_size: int, seq_len: int) -> Trace:
        run = replace(self.run, batch_size=batch_size, seq_len=seq_len)
        return extrapolated(self.config, run, special(self.held.strategy))


def traced_sizes(run: Run, seq_len: int) -> list[int]:
    """Batch sizes that are traced at a length, ascending."""
    if run.loss != "chunked":
        return list(BATCHES)
    full = max(1, CHUNK // seq_len)  # rows of a full tile: many take long to trace, and all are alike
    return sorted({1, full, 2 * full, 4 * full})


def _line(a: Mapping[str, Moment], b: Mapping[str, Moment], share: float) -> dict[str, Moment]:
    """What lies on the lines from the one to the other, and beyond."""
    found = {}
    for name in a.keys() & b.keys():
        one, other = a[name].bytes, b[name].bytes
        sizes = {key: max(0, round(one[key] + share * (other[key] - one[key]))) for key in other}
        found[name] = Moment(name, sizes, -1)
    return found


def formal(config: Any, run: Run, held: Footprint) -> bool:
    """Whether the closed form says the peak of a strategy's run, with what happens between its steps."""
    ordinary = special(held.strategy) is None and closed_form.supports(config, run)
    return ordinary and not (run.evaluates_more or held.copied or held.displaced)


def formula(config: Any, run: Run, held: Footprint) -> tuple[str, int]:
    """Binding event and peak by closed form, the strategy's bytes included."""
    totals = {name: size + held.held + held.kept for name, size in closed_form.events(config, run).items()}
    for name in totals:  # a released tensor steps inside the layers' backward
        if name == STEP or (run.gradient_release and name.startswith(("first", "last"))):
            totals[name] += held.worst
    binding = max(totals, key=lambda name: totals[name])
    return binding, totals[binding]


def as_peak(config: Any, run: Run, held: Footprint) -> Peak:
    """The closed form's answer in the shape of the trace's, with one row."""
    event, size = formula(config, run, held)
    return Peak(event, {"activations": size}, {event: size})
