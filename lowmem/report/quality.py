"""What methods learn and forget, as one Markdown page made from the document of `recipes/quality`.

A table for each beginning: a row is a method with weights held in one way, its loss the mean over seeds and
the spread the largest distance from that. A row in int8 weights says how far it is from the same method's in
bf16, over the seeds that both have.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The table's numbers of judged runs: means over the seeds."""
    found: dict[tuple[str, str, str, float], list[Run]] = {}
    for run in runs:
        if run["split"] == "heldout":
            key = (run["setting"], run["method"], run["variant"], run["lr"])
            found.setdefault(key, []).append(run)
    return [_row(some, found.get((*key[:2], "bf16", key[3]), [])) for key, some in found.items()]


def _row(some: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    losses = {run["seed"]: run["held_out"]["after"] for run in some}
    beside = {run["seed"]: run["held_out"]["after"] for run in plain}
    both = [losses[seed] / beside[seed] - 1 for seed in losses if seed in beside]
    mean = statistics.fmean(losses.values())
    one = some[0]
    return {
        **{
            key: one[key]
            for key in ("setting", "method", "variant", "lr", "steps", "state_bytes", "optim", "options")
        },
        "seeds": sorted(losses),
        "before": one["held_out"]["before"],
        "loss": mean,
        "spread": max(abs(loss - mean) for loss in losses.values()),
        "above": statistics.fmean(both) if both and one["variant"] != "bf16" else None,
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
HEAD = (
    "method", "weights", "lr", "seeds", "held-out loss", "of bf16's", "forgotten", "state MiB", "s a step",
)  # fmt: skip


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
        "All runs of a table see the same rows and steps. The learning rate is the recipe's; of several, the "
        "one of the least loss on the validation split, with bf16 weights and seed 0: see below a table.",
        "Runs share the cores with whatever else goes on, so seconds say little: `lowmem.recipes.benchmark` "
        "measures steps.",
        "",
    ]
    for setting in dict.fromkeys(run["setting"] for run in runs):
        lines += [*_setting(setting, [run for run in runs if run["setting"] == setting]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _setting(setting: str, runs: Sequence[Run]) -> list[str]:
    """The table of one beginning, what it was measured on, and the grid behind the rates."""
    found = rows(runs)
    lines = [f"## {setting}", "", ABOUT.get(setting, ""), *_measured_on(runs), ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in sorted(found, key=lambda row: _order(row))]
    grid = sorted((r["method"], r["lr"], r["held_out"]["after"]) for r in runs if r["split"] == "validation")
    if grid:
        told = "; ".join(f"{method} {lr:g}: {loss:.4f}" for method, lr, loss in grid)
        return [*lines, "", f"Validation loss of the grids: {told}."]
    only = "No rate was chosen here: compare ways to hold weights and states of one method, not methods."
    return [*lines, "", only]


def _measured_on(runs: Sequence[Run]) -> list[str]:
    before = next((r["held_out"]["before"] for r in runs if r["split"] == "heldout"), None)
    steps = sorted({run["steps"] for run in runs})
    said = f"{', '.join(map(str, steps))} steps" + (f"; loss before {before:.4f}" if before else "")
    machines = sorted({tuple(run["machine"].values()) for run in runs})
    names = tuple(runs[0]["machine"])
    return [
        f"{said}. Measured on:",
        *("- " + _machine(dict(zip(names, one, strict=True))) for one in machines),
    ]


def _machine(about: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "python"))
    return f"{about['device']}; {about['date']}; {versions}"


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["method"], list(WEIGHTS).index(row["variant"]) if row["variant"] in WEIGHTS else 9)


WEIGHTS = ("bf16", "int8", "int8 eco", "int8 nearest")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = f" +- {row['spread']:.4f}" if len(row["seeds"]) > 1 else ""
    return (
        f"`{row['optim']}({row['options']})`" if row["options"] else f"`{row['optim']}`",
        row["variant"],
        f"{row['lr']:g}",
        str(len(row["seeds"])),
        f"{row['loss']:.4f}{spread}",
        "" if row["above"] is None else f"{row['above']:+.2%}",
        "" if row["forgotten"] is None else f"{row['forgotten']:+.4f}",
        f"{row['state_bytes'] / 2**20:.1f}",
        f"{row['seconds']:.1f}",
    )
