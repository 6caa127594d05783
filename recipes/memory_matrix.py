"""Predicted memory beside measured memory, cell by cell.

Every cell is a real training step on this machine's CPU, watched by torch's own MemTracker (not by lowmem's
tracker), against what `lowmem.plan` said without weights: model family x strategy x gradient checkpointing x
gradient release x batch shape. Beside them stand the answers of two public estimators for the same models,
where they have one; they know no optimizer strategy but AdamW and SGD, and no gradient release.

    python -m lowmem.recipes.memory_matrix --output configs/data/memory_matrix.json

writes the JSON and a Markdown table beside it, and goes on where it was stopped. The models are small so that
a cell takes seconds; the error is relative, and the arithmetic is the same at any width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowmem
from lowmem.optim.release import release
from lowmem.strategies import optimizer

WIDTH = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDTH),
    "qwen2.5": ("qwen2", WIDTH),
    "qwen3": ("qwen3", WIDTH | {"head_dim": 32}),
    "gemma-2": ("gemma2", WIDTH | {"head_dim": 32, "sliding_window": 128, "query_pre_attn_scalar": 32}),
    "gpt-2": ("gpt2", {"vocab_size": 4096, "n_embd": 192, "n_layer": 2, "n_head": 6, "n_positions": 512}),
}
STRATEGIES = ("adamw", "adamw_8bit", "adafactor", "galore", "frugal", "microadam", "mezo")
SHAPES = ((2, 64), (4, 256))


@dataclass(frozen=True)
class Cell:
    """One setting; batch_size rows of seq_len tokens."""

    family: str
    strategy: str
    checkpointing: bool
    release: bool
    batch_size: int
    seq_len: int


def cells() -> Iterator[Cell]:
    """Every cell that means something: without a backward pass there is nothing to recompute or release."""
    switches = itertools.product((False, True), repeat=2)
    # strategies change fastest: they share a trace
    for family, (checkpointing, released), shape, strategy in itertools.product(
        FAMILIES, list(switches), SHAPES, STRATEGIES
    ):
        if strategy == "mezo" and (checkpointing or released):
            continue
        yield Cell(family, strategy, checkpointing, released, *shape)


def config_of(family: str) -> Any:
    """The transformers configuration of a family."""
    from transformers import CONFIG_MAPPING

    kind, fields = FAMILIES[family]
    return CONFIG_MAPPING[kind](**fields)


def predicted(cell: Cell) -> tuple[int, str]:
    """What the plan says: bytes at the peak, and where it is."""
    found = lowmem.plan(
        config_of(cell.family), cell.strategy, batch_size=cell.batch_size, seq_len=cell.seq_len,
        dtype="float32", device="cpu", gradient_checkpointing=cell.checkpointing,
        gradient_release=cell.release, max_grad_norm=0.0, advise=False,
    )  # fmt: skip
    row = found.plans[0]
    return int(row.peak["allocated"] or 0), row.event


def measured(cell: Cell) -> int:
    """Bytes at the peak of a second real step, by torch's MemTracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, batch = _model(cell), _batch(cell)
    stepper = optimizer(model, cell.strategy, lr=1e-4)
    handle = release(stepper) if cell.release else None
    _step(model, batch, stepper)  # the optimizer's state exists from now on
    stepper.zero_grad(set_to_none=True)
    tracker = MemTracker()
    # constants that the optimizer holds once are no part of optimizer.state, where torch's tracker looks
    tracker.track_external(model, stepper, *batch.values(), *stepper._constants.values())
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")  # it names every gradient that was released
        _step(model, batch, stepper, tracker.reset_mod_stats)  # its module statistics know one forward pass
    if handle is not None:
        handle.remove()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(next(size for key, size in snapshot.items() if str(getattr(key, "value", key)) == "Total"))


def _model(cell: Cell) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = config_of(cell.family)
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        model: Any = auto.from_config(config, dtype=torch.float32)
    if cell.checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable()
    return model.train()  # type: ignore[no-any-return]


def _batch(cell: Cell) -> dict[str, torch.Tensor]:
    ids = torch.arange(cell.batch_size * cell.seq_len).view(cell.batch_size, cell.seq_len) % 4000
    return {"input_ids": ids, "labels": ids.clone()}


def _step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    stepper: Any,
    before_forward: Callable[[], None] = lambda: None,
) -> None:
    def loss() -> torch.Tensor:
        before_forward()
        value: torch.Tensor = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss
        return value

    stepper.backward(loss, model)
    stepper.step()


def accelerate_says(family: str) -> int | None:
    """`accelerate estimate-memory` for training with Adam: four times the fp32 weights."""
    from accelerate.utils import calculate_maximum_sizes

    model = _model(Cell(family, "adamw", False, False, 1, 8))
    total, _ = calculate_maximum_sizes(model)
    return int(total) * 4


def fitcheck_says(cell: Cell) -> int | None:
    """`fitcheck-llm`'s tensors (its process overhead left out); None where it is absent or has no answer."""
    try:
        from fitcheck.config_parser import ModelConfig
        from fitcheck.estimator import TrainingConfig, estimate
        from fitcheck.gpu_db import GPU_DB
    except ImportError:
        return None
    if cell.strategy not in ("adamw", "adamw_8bit") or cell.release or cell.family == "gpt-2":
        return None
    from lowmem.models.entries import parameter_count, skeleton

    _, fields = FAMILIES[cell.family]
    config = config_of(cell.family)
    shape = ModelConfig(
        name=cell.family,
        num_params=parameter_count(skeleton(config, "float32")),
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_attention_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        intermediate_size=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        head_dim=fields.get("head_dim", 32),
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )
    run = TrainingConfig(
        precision="fp32",
        optimizer={"adamw": "adamw", "adamw_8bit": "adamw8bit"}[cell.strategy],
        batch_size=cell.batch_size,
        seq_len=cell.seq_len,
        lora_rank=None,
        grad_checkpoint=cell.checkpointing,
        flash_attn=True,
    )
    found = estimate(shape, run, GPU_DB["t4"])
    names = ("weight_mib", "lora_mib", "optimizer_mib", "gradient_mib", "activation_mib")
    return int(sum(getattr(found, name) for name in names) * 2**20)


def measure(wanted: Iterable[Cell], done: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows so far, after each cell; cells that are done already are kept."""
    rows = list(done)
    seen = {tuple(row[name] for name in Cell.__dataclass_fields__) for row in rows}
    others = {family: accelerate_says(family) for family in FAMILIES}
    for cell in wanted:
        if tuple(asdict(cell).values()) in seen:
            continue
        plan, event = predicted(cell)
        real = measured(cell)
        row = asdict(cell) | {"event": event, "predicted": plan, "measured": real}
        row["error_percent"] = round(100 * (plan / real - 1), 4)
        rows.append(row | {"accelerate": others[cell.family], "fitcheck": fitcheck_says(cell)})
        yield rows


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row that was predicted least well."""
    return max(rows, key=lambda row: abs(row["error_percent"]))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst error of each tool, in percent of the measured peak."""
    found: dict[str, Any] = {}
    for tool in ("predicted", "accelerate", "fitcheck"):
        errors: list[float] = [
            100 * (row[tool] / row["measured"] - 1) for row in rows if row[tool] is not None
        ]
        if errors:
            farthest: float = max(errors, key=abs)
            found[tool] = {
                "cells": len(errors),
                "mean_absolute_percent": round(sum(map(abs, errors)) / len(errors), 5),
                "worst_percent": round(farthest, 5),
            }
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, worst cell first named."""
    bad = worst(rows)
    where = ", ".join(str(bad[name]) for name in Cell.__dataclass_fields__)
    lines = [
        "# Predicted and measured memory",
        "",
        "Made by `python -m lowmem.recipes.memory_matrix`; small models, fp32, CPU, torch's MemTracker.",
        f"{len(rows)} cells; the worst is {bad['error_percent']:+.4f} % ({where}).",
        "Kernels' inner scratch is seen by neither side. The two other tools do not count the scratch of",
        "an eager step, which weighs in models this small; fitcheck-llm's process overhead is left out.",
        "",
        "| tool | cells | mean error % | worst % |",
        "|---|---|---|---|",
    ]
    for tool, found in summary(rows).items():
        name = {
            "predicted": "lowmem plan",
            "accelerate": "accelerate estimate-memory",
            "fitcheck": "fitcheck-llm",
        }[tool]
        mean, far = found["mean_absolute_percent"], found["worst_percent"]
        lines.append(f"| {name} | {found['cells']} | {mean:.5f} | {far:.5f} |")
    lines += [
        "",
        "| model | strategy | ckpt | release | batch | predicted MiB | measured MiB | error % | peak at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        switches = ["yes" if row[name] else "no" for name in ("checkpointing", "release")]
        size = [f"{row[name] / 2**20:.3f}" for name in ("predicted", "measured")]
        shape = f"{row['batch_size']} x {row['seq_len']}"
        cells_ = [
            row["family"],
            row["strategy"],
            *switches,
            shape,
            *size,
            f"{row['error_percent']:+.4f}",
            row["event"],
        ]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write both files after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    arguments = parser.parse_args()
    target: Path = arguments.output
    old = target.is_file() and not arguments.fresh
    done = json.loads(target.read_text(encoding="utf-8"))["cells"] if old else []
    if done:
        write(done, target)
    for rows in measure(cells(), done):
        write(rows, target)


def write(rows: list[dict[str, Any]], target: Path) -> None:
    """Both files, whole at any time."""
    document = {"summary": summary(rows), "worst": worst(rows), "cells": rows}
    beside = target.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, target)
    target.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
