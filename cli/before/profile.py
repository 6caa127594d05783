"""`lowmem profile`: a few real steps, predicted beside measured."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.config import RunConfig, build, read
from lowmem.errors import UserError

from .. import render
from .._configs import find, problems
from .._flags import run_flags
from .._report import renderables
from ..app import Json

# What a run of a few steps does not do: warm up, evaluate, answer, save.
_NOT_NEEDED = {
    *("eval_data", "eval_rows", "eval_steps", "epochs", "output_dir", "resume", "overwrite", "save_steps"),
    *("save_total_limit", "logging_steps", "prompt", "report", "warmup", "schedule"),
}
_NEEDED = [f.name for f in dataclasses.fields(RunConfig) if f.name not in _NOT_NEEDED]


@run_flags(only=_NEEDED)
def command(
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML with any of these settings.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Card it has to fit (see `lowmem gpus`).")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="SIZE", help="Memory it has to fit, as in 23.5GiB.")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a report.")] = None,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="FILE", help="Write the allocator's history (CUDA).")
    ] = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Run a few real steps (3 without --steps) and show measured memory beside the prediction."""
    given = {name: value for name, value in flags.items() if value is not None}
    base = {k: v for k, v in read(find(config)).items() if k in _NEEDED} if config else {}
    run = build({**base, "steps": 3, **given}, problems)
    limit = _limit(gpu, budget)
    for target in (html, snapshot):
        if target and not Path(target).expanduser().parent.is_dir():
            raise UserError(f"cannot write {target}: the folder {Path(target).parent} does not exist")
    recipe = importlib.import_module("lowmem.recipes.measure")
    from lowmem import report

    from .._progress import Bars

    with Bars() as progress:
        found = recipe.measure(
            run,
            budget=limit,
            snapshot=Path(snapshot).expanduser() if snapshot else None,
            command=shlex.join(["lowmem", *sys.argv[1:]]),
            progress=progress,
        )
    if html:
        render.say(f"report written to {report.write(found, Path(html).expanduser())}")
    render.emit(found, renderables(report.build(found)), as_json)


def _limit(gpu: str | None, budget: str | None) -> int | None:
    """Bytes the run has to fit into, or None."""
    from lowmem.memory.device import gpus

    if gpu is not None and budget is not None:
        raise UserError("gpu and budget: give one of the two")
    if gpu is not None:
        return gpus.gpu(gpu).usable
    return gpus.budget(budget).usable if budget is not None else None
