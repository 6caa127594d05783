"""Peak bytes over sequence length and batch size, without a trace for each cell.

Where closed forms describe the model they are used. Elsewhere a handful of shallow traces is fitted: every
event is a polynomial in the batch b and the length s (its terms are below), so the fit is exact but for
allocator rounding and for events whose own maximum moves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowmem.memory import closed_form
from lowmem.memory.footprint import RELEASE, STEP, Footprint, Peak, combine
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.memory.trace.replica import Trace
from lowmem.memory.trace.tracker import Moment
from lowmem.optim.strategy import Strategy

SAMPLES = ((1, 256), (2, 256), (1, 640), (3, 512), (1, 1280), (2, 1024), (5, 1024))
CHUNK = 4096  # tokens of a tile of the chunked loss


@dataclass(frozen=True)
class Surface:
    """Peaks of one model and run at any batch size and sequence length.

    Args:
        config: of the model; run: all options but batch_size and seq_len.
        strategy: one whose step is `special`, or None.
        limit: longest sequence to sample at.
    """

    config: Any
    run: Run
    strategy: Strategy | None = None
    limit: int = 1 << 30

    def peak(self, held: Footprint, batch_size: int, seq_len: int) -> int:
        """Allocated bytes at the peak."""
        run = replace(self.run, batch_size=batch_size, seq_len=seq_len)
        if self.strategy is None and closed_form.supports(self.config, run):
            return formula(self.config, run, held)[1]
        return combine(self._trace(batch_size, seq_len), held).allocated

    def _trace(self, batch_size: int, seq_len: int) -> Trace:
        moments, releases, template = self._fitted
        x = _features(batch_size, seq_len)
        return Trace(
            {name: _evaluate(fit, name, x) for name, fit in moments.items()},
            {name: _evaluate(fit, RELEASE, x) for name, fit in releases.items()},
            template.parameters,
            template.total_parameters,
            template.layers,
        )

    @functools.cached_property
    def _fitted(self) -> tuple[Mapping[str, _Fit], Mapping[str, _Fit], Trace]:
        points = [(b, s) for b, s in SAMPLES if s <= self.limit] or [
            (b, max(2, self.limit // b)) for b, _ in SAMPLES
        ]
        traces = [
            extrapolated(self.config, replace(self.run, batch_size=b, seq_len=s), self.strategy)
            for b, s in points
        ]
        rows = torch.tensor([_features(b, s) for b, s in points], dtype=torch.float64)
        moments = {name: _fit(rows, [t.moments[name] for t in traces]) for name in traces[0].moments}
        releases = {name: _fit(rows, [t.releases[name] for t in traces]) for name in traces[0].releases}
        return moments, releases, traces[0]


_Fit = Mapping[str, Sequence[float]]


def _features(batch_size: int, seq_len: int) -> list[float]:
    tokens = batch_size * seq_len
    return [
        1.0,
        tokens / 1e3,
        tokens * seq_len / 1e6,
        seq_len / 1e3,
        seq_len**2 / 1e6,
        min(tokens, CHUNK) / 1e3,
    ]


def _fit(rows: torch.Tensor, moments: Sequence[Moment]) -> _Fit:
    found = {}
    for category in moments[0].bytes:
        values = torch.tensor([[float(m.bytes[category])] for m in moments], dtype=torch.float64)
        # the least-norm solution: terms that the samples cannot tell apart share what they explain
        found[category] = (torch.linalg.pinv(rows, rtol=1e-9) @ values)[:, 0].tolist()
    return found


def _evaluate(fit: _Fit, name: str, x: Sequence[float]) -> Moment:
    sums = {key: round(sum(c * f for c, f in zip(terms, x, strict=True))) for key, terms in fit.items()}
    return Moment(name, {key: max(0, size) for key, size in sums.items()}, -1)


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
