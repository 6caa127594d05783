"""What methods learn and forget, as one Markdown page made from the document of `recipes/quality`.

Two tables for each beginning. One compares methods, each at the rate that the validation split chose, by
their distance from AdamW; the other compares ways to hold the weights of one method, at one rate, by their
distance from bf16. A loss is the mean over seeds, its spread the largest distance from that; a distance is
taken over the seeds that both rows have, on the same kind of machine: products of 16 bits round otherwise
where a processor has no instructions for them, which alone moves a loss by a percent.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The numbers of judged runs: means over the seeds, and `above` that of bf16 weights."""
    groups = _judged(runs)
    return [_row(some, groups.get((*key[:2], "bf16", *key[3:]), [])) for key, some in groups.items()]


def methods(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of methods in bf16 weights whose rate was chosen, by `above`: their distance from AdamW."""
    groups = _judged(runs)
    rates = chosen(runs)
    of = {
        (setting, method, place): some
        for (setting, method, variant, lr, place), some in groups.items()
        if variant == "bf16" and rates.get((setting, method)) == lr
    }
    found = [_row(some, of.get((key[0], BESIDE, key[2]), [])) for key, some in of.items()]
    return sorted(found, key=lambda row: float(row["above"] or 0.0))


def measured(strategy: str) -> list[dict[str, Any]]:
    """What was measured of a strategy, with each of the options that were tried; the document comes along.

    Returns:
        [{"setting", "options", "lr", "hyper", "seeds", "loss", "above", "state_bytes", ...}], `above` as a
        share of AdamW's loss, None for itself.

    Example:
        >>> [row["above"] for row in measured("adamw") if row["setting"] == "demo"]
        [None]
    """
    from importlib import resources

    kept = resources.files("lowmem.configs") / "measured" / "quality.json"
    found = methods(json.loads(kept.read_text(encoding="utf-8"))["runs"])
    most: dict[tuple[str, str], dict[str, Any]] = {}  # on other kinds of machines AdamW is a measure alone
    for row in sorted(found, key=lambda row: len(row["seeds"])):
        most[row["setting"], row["method"]] = row
    return [row for row in found if row["optim"] == strategy and row in most.values()]


def told(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A row of `measured` in words: the task, options and rate, the loss beside AdamW's, and MiB of state."""
    options = "".join(f", {row[key]}" for key in ("hyper", "options") if row[key])
    seeds = f"{len(row['seeds'])} seeds" if len(row["seeds"]) > 1 else "1 seed"
    loss = f"{row['loss']:.4f}" if row["above"] is None else f"{row['loss']:.4f} ({row['above']:+.1%})"
    task = TASKS.get(row["setting"], row["setting"])
    return task, f"lr={row['lr']:g}{options}", f"{loss}, {seeds}", _mib(row)


def chosen(runs: Iterable[Run]) -> dict[tuple[str, str], float]:
    """The rate of the least validation loss, by beginning and method."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for run in runs:
        if run["split"] == "validation":
            key, this = (run["setting"], run["method"]), (run["held_out"]["after"], run["lr"])
            best[key] = min(best.get(key, this), this)
    return {key: lr for key, (_, lr) in best.items()}


def _judged(runs: Iterable[Run]) -> dict[tuple[str, str, str, float, str], list[Run]]:
    """Runs on the held-out split that differ by their seed alone."""
    found: dict[tuple[str, str, str, float, str], list[Run]] = {}
    for run in runs:
        if run["split"] == "heldout":
            key = (run["setting"], run["method"], run["variant"], run["lr"], run["machine"]["device"])
            found.setdefault(key, []).append(run)
    return found


def _row(some: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    losses = {run["seed"]: run["held_out"]["after"] for run in some}
    beside = {run["seed"]: run["held_out"]["after"] for run in plain}
    both = [losses[seed] / beside[seed] - 1 for seed in losses if seed in beside]
    mean, one = statistics.fmean(losses.values()), some[0]
    kept = ("setting", "method", "variant", "lr", "steps", "state_bytes", "optim", "options")
    return {
        **{key: one[key] for key in kept},
        "hyper": one.get("hyper", ""),
        "place": one["machine"]["device"],
        "seeds": sorted(losses),
        "before": one["held_out"]["before"],
        "loss": mean,
        "spread": max(abs(loss - mean) for loss in losses.values()),
        "above": statistics.fmean(both) if both and some is not plain else None,
        "forgotten": _forgotten(some),
        "seconds": statistics.median(run["seconds"] / run["steps"] for run in some),
    }


def _forgotten(some: Sequence[Run]) -> float | None:
    told = [run["general"] for run in some if run["general"]]
    return statistics.fmean(one["after"] - one["before"] for one in told) if told else None


COMMAND = "python -m lowmem.recipes.quality --output-dir quality"
ABOUT = {
    "demo": "SmolLM2-135M fine-tuned on the demo data. Held-out loss is that of answers about countries it "
    "never trains on; forgotten is how much the loss on general text rises.",
    "scratch": "A Llama of 9.7M parameters from random weights, on the reference that ships with Python. "
    "Held-out are topics that it does not read.",
}
TASKS = {"demo": "SmolLM2-135M on the demo", "scratch": "9.7M Llama from scratch"}
TOLD = ("measured", "with", "held-out loss (beside adamw)", "MiB of state")
_INSIDE = (
    "steps inside a subspace that the first gradients decide; what lies outside waits for refreshes that "
    "so few steps do not reach"
)
_TURNS = "a few tensors, or layers, at a time: in so few steps most of them never move, or hardly"
_SHARED = "one second moment for a row, a column or a head, whose elements differ much in a trained model"
REASONS = {
    **dict.fromkeys(("galore", "galore_roles", "q_galore", "q_galore_roles", "golore", "lotus"), _INSIDE),
    **dict.fromkeys(("grass_walk", "subtrack", "subspace_momentum", "online_subspace"), _INSIDE),
    **dict.fromkeys(("dct", "ldadam", "mlorc"), _INSIDE),
    **dict.fromkeys(("badam", "lisa", "misa"), _TURNS),
    **dict.fromkeys(("adam_mini", "subset_norm"), _SHARED),
    "adamw_4bit": "moments of 4 bits, at AdamW's own rate",
    "adan": "averages the difference of gradients, which is noise where every batch is one row",
    "apollo_mini": "one row of noise per matrix says how long a step is",
    "came": "steps by how much updates differ, which is noise where every batch is one row",
    "diffgrad": "steps by how much gradients differ, which is noise where every batch is one row",
    "sgd": "one length of step for all elements, whose gradients differ much in size",
    "microadam": "a hundredth of each block's elements move in a step; the rest waits in the error",
}
"""Why a method learns less than AdamW in so few steps."""
UNKNOWN = "no reason is known"
BESIDE = "adamw"
FAR = 0.01
"""Above AdamW's loss, a distance that wants a reason."""
HEAD = ("method", "on", "lr", "seeds", "held-out loss", "of AdamW's", "forgotten", "state MiB", "s a step")
HELD = ("method", "on", "weights", "lr", "seeds", "held-out loss", "of bf16's", "state MiB", "s a step")


def markdown(document: Mapping[str, Any]) -> str:
    """The page of what the recipe found.

    Args:
        document: "runs", each with its setting, method, variant, split, lr, seed, losses and machine.

    Example:
        >>> "Not yet measured" in markdown({"runs": []})
        True
    """
    runs = document["runs"]
    lines = ["# What methods learn and forget", ""]
    if not runs:
        return "\n".join([*lines, "Not yet measured.", ""])
    lines += [
        f"Made by `{COMMAND}`, then `--page docs/quality.md --of configs/measured/quality.json`.",
        "All runs of a table see the same rows and steps. A method has the learning rate of the least loss "
        "on the validation split, with bf16 weights and seed 0, among those listed below its table.",
        "Losses of different seeds belong to different rows, and kinds of processors round otherwise: "
        "compare by the distance from AdamW's, which is taken over the same seeds on the same kind. Rates "
        "are a factor of three apart, which alone moves a loss by some percent.",
        "Runs share the cores with whatever else goes on, so seconds say little: `lowmem.recipes.benchmark` "
        "measures steps.",
        "",
    ]
    for setting in dict.fromkeys(run["setting"] for run in runs):
        some = [run for run in runs if run["setting"] == setting]
        lines += [*_setting(setting, some, document.get("reasons", {})), ""]
    return "\n".join(lines).rstrip() + "\n"


def _setting(setting: str, runs: Sequence[Run], reasons: Mapping[str, str]) -> list[str]:
    """The tables of one beginning, what it was measured on, and the grid behind the rates."""
    places = {
        place: chr(ord("a") + i) for i, place in enumerate(sorted({r["machine"]["device"] for r in runs}))
    }
    lines = [f"## {setting}", "", ABOUT.get(setting, ""), *_measured_on(runs, places), ""]
    if found := methods(runs):
        lines += _table(HEAD, [_of_method(row, places) for row in found])
        lines += [*_far(found, reasons), "", f"Validation losses: {_grids(runs)}.", ""]
    several = {(r["method"], r["lr"], r["machine"]["device"]) for r in runs if r["variant"] != "bf16"}
    held = [row for row in rows(runs) if (row["method"], row["lr"], row["place"]) in several]
    if held:
        lines += ["Ways to hold the weights of a method, at one rate:", ""]
        lines += _table(HELD, [_of_weights(row, places) for row in sorted(held, key=_order)])
    return lines


def _table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]


def _far(found: Iterable[Mapping[str, Any]], reasons: Mapping[str, str]) -> list[str]:
    """Methods that learn less than AdamW, by the reason."""
    named: dict[str, list[str]] = {}
    for row in found:
        if (row["above"] or 0) > FAR:
            named.setdefault(reasons.get(row["method"], UNKNOWN), []).append(f"`{row['method']}`")
    said = [f"- {', '.join(names)}: {reason}" for reason, names in named.items()]
    return ["", f"More than {FAR:.0%} above AdamW's loss:", "", *said] if said else []


def _grids(runs: Iterable[Run]) -> str:
    grid: dict[str, list[str]] = {}
    for run in sorted((r for r in runs if r["split"] == "validation"), key=lambda r: (r["method"], r["lr"])):
        grid.setdefault(run["method"], []).append(f"{run['lr']:g}: {run['held_out']['after']:.4f}")
    return "; ".join(f"{method} {', '.join(told)}" for method, told in grid.items())


def _measured_on(runs: Sequence[Run], places: Mapping[str, str]) -> list[str]:
    before = next((r["held_out"]["before"] for r in runs if r["split"] == "heldout"), None)
    steps = sorted({run["steps"] for run in runs})
    said = f"{', '.join(map(str, steps))} steps" + (f"; loss before {before:.4f}" if before else "")
    machines = sorted({tuple(run["machine"].values()) for run in runs})
    names = tuple(runs[0]["machine"])
    return [
        f"{said}. Measured on:",
        *(_machine(dict(zip(names, one, strict=True)), places) for one in machines),
    ]


def _machine(about: Mapping[str, str], places: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "python"))
    return f"- {places[about['device']]}: {about['device']}; {about['date']}; {versions}"


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["method"], list(WEIGHTS).index(row["variant"]) if row["variant"] in WEIGHTS else 9)


WEIGHTS = ("bf16", "int8", "int8 eco", "int8 nearest")


def _of_method(row: Mapping[str, Any], places: Mapping[str, str]) -> tuple[str, ...]:
    name, rate, seeds = _name(row)
    return (
        name,
        places[row["place"]],
        rate,
        seeds,
        *_loss(row),
        "" if row["forgotten"] is None else f"{row['forgotten']:+.4f}",
        *_cost(row),
    )


def _of_weights(row: Mapping[str, Any], places: Mapping[str, str]) -> tuple[str, ...]:
    name, rate, seeds = _name(row)
    return (name, places[row["place"]], row["variant"], rate, seeds, *_loss(row), *_cost(row))


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    options = f"({row['options']})" if row["options"] else ""
    rate = f"{row['lr']:g}" + (f", {row['hyper']}" if row["hyper"] else "")
    return f"`{row['optim']}{options}`", rate, str(len(row["seeds"]))


def _loss(row: Mapping[str, Any]) -> tuple[str, str]:
    spread = f" +- {row['spread']:.4f}" if len(row["seeds"]) > 1 else ""
    return f"{row['loss']:.4f}{spread}", "" if row["above"] is None else f"{row['above']:+.2%}"


def _mib(row: Mapping[str, Any]) -> str:
    return f"{row['state_bytes'] / 2**20:.1f}"


def _cost(row: Mapping[str, Any]) -> tuple[str, str]:
    return _mib(row), f"{row['seconds']:.1f}"
