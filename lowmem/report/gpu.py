"""What was measured on GPUs, as one Markdown page made from the documents of `recipes/gpu`.

A table for each card: optimizer steps beside peers, predicted beside measured memory, training, and the
largest model under a cap. Every figure names the device, the date and the versions it belongs to; misses of
the plan are listed, not averaged away. Without a document the page says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COMMAND = "python recipes/gpu --output configs/measured/gpu-CARD.json"
TOLERANCE = {"allocated": 1.0, "reserved": 3.0, "device": 3.0}
"""Percent by which a prediction may be off before it is listed as a miss."""


def markdown(documents: Iterable[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        documents: what `recipes/gpu` wrote, one for each card.

    Example:
        >>> "Not yet measured" in markdown([])
        True
    """
    lines = [
        "# Measured on GPUs",
        "",
        f"Made by `{COMMAND}`, then `python recipes/gpu --page docs/gpu.md`.",
        "",
    ]
    bodies = [_card(document) for document in documents]
    lines += (
        [line for body in bodies for line in body]
        if bodies
        else ["Not yet measured: lowmem has not run on a GPU.", ""]
    )
    return "\n".join(lines).rstrip() + "\n"


def _card(document: Mapping[str, Any]) -> list[str]:
    about, parts = document["machine"], document["parts"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}, Python {about['python']}"
    lines = [f"## {about['device']}", "", f"{about['date']}; {versions}.", ""]
    makers = {
        "tests": _tests,
        "methods": _methods,
        "steps": _steps,
        "plan": _plan,
        "train": _train,
        "fit": _fit,
    }
    for name, maker in makers.items():
        if name in parts and parts[name]["rows"]:
            lines += [*maker(parts[name]), ""]
    for name, part in parts.items():
        lines += [f"- {name}, left out: {what}" for what in part["left_out"]]
        lines += [f"- {name} ended early: {part['error'][-1]}"] if part.get("error") else []
    return [*lines, ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _tests(part: Mapping[str, Any]) -> list[str]:
    found = part["rows"][0]
    return [f"`pytest -m cuda`: {found['closing'].strip('= ')}.", *(f"- {line}" for line in found["failed"])]


def _methods(part: Mapping[str, Any]) -> list[str]:
    """Compiled beside eager, and what a step asks for; what failed stands below."""
    seen = [row for row in part["rows"] if "differ" in row]
    head = (
        "method",
        "tensors",
        "kernels of a step",
        "eager",
        "waits",
        "compiled beside eager: largest, share",
    )
    table = _table(head, (_method(row) for row in seen))
    failed = [f"- {row['name']}: {row['error']}" for row in part["rows"] if "error" in row]
    return ["Every method on a small bf16 model.", "", *table, *([""] if failed else []), *failed]


def _method(row: Mapping[str, Any]) -> tuple[str, ...]:
    off = f"{row['largest_difference']:.1e}, {100 * row['differ']:.2f} %"
    counts = (row[key] for key in ("tensors", "kernels_on", "kernels_off", "waits_on"))
    return (row["name"], *map(str, counts), off)


def _steps(part: Mapping[str, Any]) -> list[str]:
    lines = [f"One optimizer step; the card copies {part['copy_bytes_per_second'] / 1e9:.0f} GB/s.", ""]
    head = (
        "optimizer",
        "weights",
        "ms",
        "share of copy bandwidth",
        "state MiB",
        "peak above MiB",
        "first step s",
    )
    return lines + _table(head, (_step(row) for row in part["rows"]))


def _step(row: Mapping[str, Any]) -> tuple[str, ...]:
    above = row["peak_above_weights_and_gradients"]
    return (
        row["name"], f"{row['shape']} {row['dtype']}", f"{row['milliseconds']:.2f}",
        f"{100 * row['share_of_copy_bandwidth']:.0f} %", f"{row['state_bytes'] / 2**20:.1f}",
        "" if above is None else f"{above / 2**20:.1f}", f"{row['first_step_seconds']:.1f}",
    )  # fmt: skip


def _plan(part: Mapping[str, Any]) -> list[str]:
    rows = part["rows"]
    misses = [
        f"- miss: {row['model']} {row['strategy']}, {key} {error:+.2f} %"
        for row in rows
        for key, error in row["error_percent"].items()
        if abs(error) > TOLERANCE[key]
    ]
    head = (
        "model",
        "strategy",
        "checkpointing",
        "release",
        "batch",
        "allocated %",
        "reserved %",
        "device %",
        "held out",
    )
    lines = ["Predicted against measured memory.", "", *_table(head, (_cell(row) for row in rows)), ""]
    return [*lines, *(misses or ["No cell is off by more than 1 % (allocated) or 3 % (reserved, device)."])]


def _cell(row: Mapping[str, Any]) -> tuple[str, ...]:
    off = row["error_percent"]
    errors = [f"{off[key]:+.2f}" if key in off else "" for key in ("allocated", "reserved", "device")]
    switches = ["yes" if row[key] else "no" for key in ("checkpointing", "release")]
    shape = f"{row['batch_size']} x {row['seq_len']}"
    return (row["model"], row["strategy"], *switches, shape, *errors, "yes" if row["held_out"] else "no")


def _train(part: Mapping[str, Any]) -> list[str]:
    rows = [row for row in part["rows"] if "tokens_per_second" in row]
    head = ("optimizer", "batch", "tokens a second", "optimizer's share")
    found = (
        (
            row["name"], f"{row['batch_size']} x {row['seq_len']}", f"{row['tokens_per_second']:.0f}",
            f"{row['optimizer_percent']:.1f} %",
        )
        for row in rows
    )  # fmt: skip
    return ["Training steps.", "", *_table(head, found)]


def _fit(part: Mapping[str, Any]) -> list[str]:
    def word(row: Mapping[str, Any], key: str) -> str:
        return {True: "ran", False: "out of memory", None: "not run"}[row.get(key)]

    rows = (
        (str(r["cap_gib"]), str(r["layers"]), word(r, "ran"), word(r, "one_notch_above_ran"))
        for r in part["rows"]
    )
    head = ("cap GiB", "layers that the plan lets in", "there", "one notch above")
    return ["The deepest 1.1B-wide Llama under a cap.", "", *_table(head, rows)]
