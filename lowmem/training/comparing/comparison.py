"""A comparison as one document: losses over the seeds, memory, and the front of what nothing beats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.config import RunConfig
from lowmem.report.document import plain
from lowmem.training.comparing.contenders import Contender

Outcome = Mapping[str, Any]
Job = tuple[Contender, RunConfig, Outcome | None]


def document(jobs: Sequence[Job], tokens: int | None = None, command: str = "") -> dict[str, Any]:
    """The comparison as it stands; a strategy that has not been tried yet is left out.

    Args:
        jobs: who ran, with which settings, and what came of it (None: not yet); at least one.
        tokens: the budget, if it was one of tokens.
        command: how the comparison was started.

    Returns:
        {"kind", "model", "run", "runs", "front", "assumptions", "command"}.
    """
    from lowmem.report.compare import best
    from lowmem.report.plan import labels

    tried: dict[Contender, list[tuple[int, Outcome]]] = {}
    for contender, config, outcome in jobs:
        if outcome is not None:
            tried.setdefault(contender, []).append((config.seed, outcome))
    models = [o["model"] for outcomes in tried.values() for _, o in outcomes if o["status"] == "done"]
    runs = [_merged(contender, outcomes) for contender, outcomes in tried.items()]
    names = labels(runs, whole=True)
    return {
        "kind": "compare",
        "model": models[0] if models else {"name": jobs[0][1].model},
        "run": _settings([config for _, config, _ in jobs], tokens),
        "runs": runs,
        "front": [names[i] for i in best(runs)],
        "assumptions": _assumptions([config for _, config, _ in jobs]),
        "command": command,
    }


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step with full rows."""
    return config.batch_size * config.accumulation * config.seq_len


def _settings(configs: Sequence[RunConfig], tokens: int | None) -> dict[str, Any]:
    first = configs[0]
    names = ("batch_size", "accumulation", "seq_len", "dtype", "data")
    return {
        "steps": first.steps,
        "tokens": tokens or tokens_per_step(first) * (first.steps or 0),
        **{name: getattr(first, name) for name in names},
        "seeds": sorted({config.seed for config in configs}),
    }


def _assumptions(configs: Sequence[RunConfig]) -> list[str]:
    rates = sorted({config.lr for config in configs if config.lr is not None})
    same = f"all with lr {rates[0]:g}" if len(rates) == 1 else "with the learning rates named beside them"
    seeds = len({config.seed for config in configs})
    return [
        f"Same model, data, order of rows and number of steps for every strategy, {same}. A strategy may do "
        "better with another learning rate: give it as NAME(lr=...).",
        f"{seeds} seed{'s' if seeds > 1 else ''}: differences as small as those between seeds mean nothing.",
        "Loss: nats per label token on held-out rows. Peak: tensors live at the highest instant of the "
        "tracked step.",
        "Time per step: median of the untracked steps after the first, on this machine as loaded as it was.",
    ]


def _merged(contender: Contender, outcomes: Sequence[tuple[int, Outcome]]) -> dict[str, Any]:
    """One row from the runs of all seeds: memory of the first, losses averaged."""
    who = {"strategy": contender.name, "options": dict((*contender.options, *contender.hyper))}
    lost = [f"seed {seed}: {outcome['reason']}" for seed, outcome in outcomes if outcome["status"] != "done"]
    if lost:
        return {**who, "status": "failed", "reason": "; ".join(lost)}
    done = [outcome for _, outcome in outcomes]
    return {
        **who,
        "status": "done",
        "reason": None,
        "loss_before": _mean([o["loss_before"] for o in done]),
        "loss_after": _mean([o["loss_after"] for o in done]),
        **{key: _mean([o.get(key) for o in done]) for key in ("general_before", "general_after")},
        "benchmarks": _mean_scores(done),
        "losses": [{"seed": seed, "loss_after": o["loss_after"]} for seed, o in outcomes],
        "curve": [
            {**points[0], "loss": _mean([p["loss"] for p in points])}
            for points in zip(*(o["curve"] for o in done), strict=False)
        ],
        "seconds_per_step": _mean([o["seconds_per_step"] for o in done]),
        **{key: done[0][key] for key in ("measured", "predicted", "error_percent")},
    }


def _mean_scores(done: Sequence[Outcome]) -> dict[str, float | None]:
    """Scores of benchmarks after the run, by name."""
    after = [(outcome.get("benchmarks") or {}).get("after") or {} for outcome in done]
    return {name: _mean([one.get(name) for one in after]) for name in after[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where one of them is not known (a loss that was not finite)."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def outcome_of(result: Mapping[str, Any], report: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """What a comparison keeps of a finished run.

    Args:
        result: what the recipe `finetune` returned.
        report: the run's memory_report.json.
        config: the run.
    """
    found: dict[str, Any] = plain(
        {
            **_losses(result, report["log"], tokens_per_step(config)),
            **_memory(report),
            "model": report.get("model", {"name": config.model}),
        }
    )
    return found


def _losses(result: Mapping[str, Any], log: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """Held-out loss before, during and after."""
    before, after = result["loss"]["before"], result["loss"]["after"]
    between = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    points = [(0, before), *between, (result["steps"], after)]
    general = result.get("general") or {}
    curve = [{"step": step, "tokens": step * tokens, "loss": loss} for step, loss in points]
    losses = {"loss_before": before, "loss_after": after, "curve": curve}
    text = {f"general_{when}": general.get(when) for when in ("before", "after")}
    return {"status": "done", "reason": None, **losses, **text, "benchmarks": result.get("benchmarks") or {}}


def _memory(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the profiler measured, without timelines; nothing where a resumed run had no step left."""
    steps = report.get("steps") or []
    ordinary = [s["seconds"] for s in steps if not s.get("tracked") and s["step"] > 1]
    times = ordinary or [s["seconds"] for s in steps]
    sides = {side: report.get(side) for side in ("measured", "predicted")}
    return {
        **{side: row and {k: v for k, v in row.items() if k != "timeline"} for side, row in sides.items()},
        "error_percent": report.get("error_percent") or {},
        "seconds_per_step": statistics.median(times) if times else None,
    }
