"""What the report draws of a plan: timeline, lever-by-lever waterfall, map over sequence and batch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lowmem.memory import plan as planning
from lowmem.memory.advice.levers import waterfall
from lowmem.memory.footprint import STEP, Footprint, footprint
from lowmem.memory.surface import Surface
from lowmem.memory.trace.replica import Trace
from lowmem.memory.trace.sampling import timeline
from lowmem.models.positions import longest

if TYPE_CHECKING:
    from lowmem.memory.plan import Plan, StrategyPlan
    from lowmem.optim.strategy import Strategy

SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAPS = 3  # strategies that get a map
STEPS = 12  # samples of the optimizer's step, wide enough to be seen


def report_data(plan: Plan) -> dict[str, Any]:
    """The plan's document with everything that `report` draws besides."""
    document = plan.to_dict()
    for entry, row, strategy in zip(document["plans"], plan.plans, plan.made, strict=True):
        entry.update(extras(plan, row, strategy))
    document["waterfall"] = waterfall(plan.config, plan.run, plan.made[0])
    document["grid"] = [_grid(plan, strategy) for strategy in plan.made[:MAPS]]
    document["assumptions"] = list(plan.assumptions)
    document["warnings"] = list(plan.warnings)
    document["command"] = plan.command
    if plan.budget is not None:
        document["gpu"] = plan.budget.to_dict()
    return document


def extras(plan: Plan, row: StrategyPlan, strategy: Strategy) -> dict[str, Any]:
    """What the report draws of one strategy: its step over time, its levers, the largest that fits."""
    found = planning.traced(plan.config, plan.run, strategy)
    more: dict[str, Any] = {
        "levers": [{**asdict(lever), "lever": lever.name} for lever in row.levers],
        "verdict": row.verdict,
        "max_seq_len": row.max_seq_len,
        "max_batch_size": row.max_batch_size,
    }
    if found.tracker is not None:
        line = _with_optimizer(
            timeline(found.tracker), found, footprint(strategy, found.parameters, plan.run)
        )
        more["timeline"] = {**line, "events": _marks(line, row)}
    return more


def _with_optimizer(line: dict[str, Any], found: Trace, held: Footprint) -> dict[str, Any]:
    """The timeline with what the optimizer holds, and with its step where that is a phase of its own."""
    rows = line["bytes"]
    kept = {"optimizer_state": held.held, "workspace": held.kept}
    for key, size in kept.items():
        rows[key] = [value + size for value in rows[key]]
    if STEP not in found.moments:
        return line
    phases = [phase for phase in line["phases"] if phase["name"] != STEP]
    begun = phases[-1]["stop"] + 1
    before = found.moments[STEP].bytes
    for key, values in rows.items():
        del values[begun:]
        level = before.get(key, 0) + kept.get(key, 0)
        high = level + (held.worst if key == "workspace" else 0)
        values += [level, *[high] * (STEPS - 2), level]
    return {**line, "phases": [*phases, {"name": STEP, "start": begun, "stop": begun + STEPS - 1}]}


def _marks(line: dict[str, Any], row: StrategyPlan) -> list[dict[str, Any]]:
    """The binding event, at its highest sample."""
    phase = next((p for p in line["phases"] if p["name"] == row.event), None)
    if phase is None:
        return []
    totals = [sum(column) for column in zip(*line["bytes"].values(), strict=True)]
    at = max(range(phase["start"], phase["stop"] + 1), key=totals.__getitem__)
    return [{"name": row.event, "at": at}]


def _grid(plan: Plan, strategy: Strategy) -> dict[str, Any]:
    most = longest(plan.config) or SEQ_LENS[-1]
    lengths = [s for s in SEQ_LENS if s <= most] or [most]
    run = planning.suited(plan.run, strategy)
    found = planning.traced(plan.config, plan.run, strategy)
    surface = Surface(plan.config, run, footprint(strategy, found.parameters, run))
    peaks = [[surface.peak(b, s) for b in BATCH_SIZES] for s in lengths]
    return {
        "strategy": strategy.name or "custom", "options": dict(strategy.options), "seq_lens": lengths,
        "batch_sizes": list(BATCH_SIZES), "peak": peaks,
    }  # fmt: skip
