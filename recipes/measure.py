"""Take a few real steps and say where the memory went, beside what the plan says of them.

    config -> data, model and trainer as `finetune` makes them -> a few steps, the last one tracked -> profile

Nothing is evaluated, saved or kept. Copy it (`lowmem cp measure my.py`) and change what you like: it prints
nothing and returns plain values.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig
from lowmem.console import Console

SETTINGS = (
    *("batch_size", "seq_len", "accumulation", "dtype", "packing", "lora_rank", "quantize"),
    *("gradient_checkpointing", "gradient_release"),
)


def measure(
    config: RunConfig,
    *,
    budget: int | None = None,
    snapshot: Path | None = None,
    command: str = "",
    progress: Console | None = None,
) -> dict[str, Any]:
    """Measure `config.steps` steps; the last one is tracked.

    Args:
        config: the run; its output folder is not touched.
        budget: bytes it has to fit into.
        snapshot: file for the allocator's history (CUDA).
        command: how it was started, for the report.
        progress: told what happens; silent when None.

    Returns:
        The document of `lowmem profile --json`.

    Raises:
        UserError: whatever the user can mend; also when memory runs out, with the table and what to change.
    """
    from lowmem.memory.measure.profile import Profiler
    from lowmem.memory.predict import of_run
    from lowmem.models.quiet import quiet
    from lowmem.outside import bring

    bring(config.plugin)
    finetune = importlib.import_module("lowmem.recipes.finetune")
    console, steps = progress or Console(), config.steps or 3
    run = {name: getattr(config, name) for name in SETTINGS}
    profiler = Profiler(
        of_run(config), config.model, run, at=steps, budget=budget, command=command, snapshot=snapshot
    )
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        once = dataclasses.replace(config, steps=steps, eval_rows=1, output_dir=str(Path(scratch) / "run"))
        args = finetune.arguments(once)
        args.save_strategy = "no"
        trainer = finetune.prepare(once, args, console)
        console.start("steps", steps)
        with profiler.on(trainer):
            trainer.train()
        console.finish()
        console.start("predict")
        found = profiler.result().to_dict()
        console.finish()
    return found


if __name__ == "__main__":
    importlib.import_module("lowmem.recipes").main(measure)
