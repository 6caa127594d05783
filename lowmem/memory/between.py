"""What a run takes beside its steps, and what a caching allocator makes of both.

    load          int8 weights are made, before there is state
    evaluation    a forward pass over a batch of its own size, after a step
    save          a checkpoint is written from the tensors

Whoever judges whether a run fits goes by the larger of a step and these. An evaluation of no more rows than a
step has lives inside what that step's own forward pass holds: where many runs are compared, it is not traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem.memory.device.allocator import Verdict, simulate
from lowmem.memory.footprint import LOAD, SAVE, Footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import evaluated
from lowmem.memory.trace.replica import EVALUATION, Trace
from lowmem.memory.trace.tracker import CATEGORIES, Moment, Tracker
from lowmem.optim.int8.coding import PIECE

ENCODING = 20
"""Bytes on the way to a code, of fp32 copies."""


def beside(config: Any, run: Run, found: Trace) -> dict[str, Moment]:
    """All that happens between the steps of a run.

    Args:
        config: of the model; run: the options; found: the trace of a step.
    """
    evaluation = run.evaluation
    evaluations = {EVALUATION: evaluated(config, evaluation)} if evaluation is not None else {}
    return {**evaluations, **_files(run, found)}


def above(config: Any, run: Run, found: Trace, held: Footprint) -> dict[str, Moment]:
    """Of what happens between steps that which can take more than one.

    Args:
        config, run, found: as for `beside`; held: of the strategy.
    """
    return beside(config, run, found) if evaluates_more(run, held) else _files(run, found)


def evaluates_more(run: Run, held: Footprint) -> bool:
    """Whether an evaluation can take more than a step: of more rows, or of weights that are displaced."""
    return run.evaluation is not None and (run.evaluates_more or bool(held.displaced))


def _files(run: Run, found: Trace) -> dict[str, Moment]:
    loads = {LOAD: loading(found, run)} if run.weights else {}
    return {**loads, SAVE: saving(found, run)}


def saving(trace: Trace, run: Run) -> Moment:
    """What lives while a checkpoint is written, beside the optimizer's: files are written from the tensors.

    On a CUDA device each is copied to the host for it, one after the other.
    """
    weights = min(moment.bytes.get("weights", 0) for moment in trace.moments.values())
    library = -(-run.library // run.granularity) * run.granularity
    taken = {"weights": weights, "workspace": library + decoded(trace)}
    return Moment(SAVE, dict.fromkeys(CATEGORIES, 0) | taken, -1)


def loading(trace: Trace, run: Run) -> Moment:
    """What lives while int8 weights are made: those that are, and one of the file, encoded by pieces."""
    weights = min(moment.bytes.get("weights", 0) for moment in trace.moments.values())
    sizes = [(p.elements, p.dtype.itemsize) for p in trace.parameters]
    largest = max(count * each + ENCODING * min(count, PIECE) for count, each in sizes)
    return Moment(LOAD, dict.fromkeys(CATEGORIES, 0) | {"weights": weights, "workspace": largest}, -1)


def decoded(trace: Trace) -> int:
    """Bytes of the largest weight of codes, as it is written."""
    return max([0, *(p.elements * p.dtype.itemsize for p in trace.parameters if p.coded)])


def simulated(
    found: Trace, held: Footprint, capacity: int | None, evaluation: Tracker | None = None
) -> Verdict:
    """What the caching allocator makes of the steps, and of an evaluation after them."""
    if found.tracker is None:
        raise ValueError("the allocator needs a full trace")
    tracker = found.tracker
    start = tracker.phases[0][0]
    scratch = [(len(tracker.stream), held.worst)]
    if found.releases:
        name = max(found.releases, key=lambda n: found.releases[n].total + held.scratch.get(n, 0))
        scratch = [(found.releases[name].at, held.scratch.get(name, 0))]
    kept = (*held.tensors, *held.grids)
    after = _alone(evaluation, held.displaced) if evaluation is not None else ((), ())
    return simulate(tracker.stream, tracker.sizes, start, kept, scratch, capacity=capacity, after=after)


def _alone(tracker: Tracker, displaced: Sequence[int]) -> tuple[list[int], list[int]]:
    """Stream and sizes of an evaluation, of which weights and libraries are there already.

    Args:
        tracker: of the evaluation; displaced: sizes of the copies of weights that it holds.
    """
    start = tracker.phases[0][0]
    inputs = [entry for entry in tracker.stream[:start] if tracker.categories[entry - 1] == "activations"]
    count = len(tracker.sizes)
    copies = list(range(count + 1, count + 1 + len(displaced)))
    return copies + inputs + tracker.stream[start:], [*tracker.sizes, *displaced]
