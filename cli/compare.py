"""`lowmem compare`: loss x memory x time of several strategies on the user's model and data."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.config import RunConfig, read
from lowmem.errors import UserError

from . import render
from ._configs import find, problems, shipped
from ._flags import run_flags
from ._report import renderables
from .app import Json

# Of one run, not of a comparison; the rest of finetune's flags hold for all strategies alike.
_NOT_SHARED = {
    "optim",
    "optim_args",
    "seed",
    "output_dir",
    "resume",
    "overwrite",
    "prompt",
    "report",
    "epochs",
}
_SHARED = [f.name for f in dataclasses.fields(RunConfig) if f.name not in _NOT_SHARED]


@run_flags(only=_SHARED)
def command(
    optim: Annotated[
        str,
        typer.Option("--optim", metavar="NAME,...", help="Strategies, as in adamw,galore(rank=64,lr=5e-4)."),
    ],
    tokens: Annotated[
        int | None, typer.Option(help="Budget in training tokens, instead of --steps.", min=1, max=2**48)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Run each strategy once with each of these.")] = "0",
    output_dir: Annotated[
        str | None, typer.Option(help="Folder to write, continued if it is there; outputs/MODEL-compare.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="YAML with shared settings; flags win over it."),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the weights of every run.")
    ] = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Compare strategies on one model and data: held-out loss, memory, time. Goes on where it stopped."""
    given = {name: value for name, value in flags.items() if value is not None}
    settings = {k: v for k, v in _base(given, config).items() if k in _SHARED} | given
    if tokens is not None and "steps" not in given:
        settings.pop("steps", None)
    folder = output_dir or f"outputs/{Path(str(settings.get('model', 'model'))).name}-compare".lower()
    recipe = importlib.import_module("lowmem.recipes.compare")
    from ._progress import Bars

    with Bars() as progress:
        found = recipe.compare(
            settings,
            optim,
            output_dir=folder,
            tokens=tokens,
            seeds=_seeds(seeds),
            keep_models=keep_models,
            command=shlex.join(["lowmem", *sys.argv[1:]]),
            check=problems,
            progress=progress,
        )
    found["report"] = str(Path(folder) / "comparison.html")
    render.emit(found, [*_tables(found), f"written to {found['report']}"], as_json)
    if all(run["status"] == "failed" for run in found["runs"]):
        raise UserError(f"every run failed; see {folder}/runs")


def _base(given: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Settings under the flags: those of --config, or of the demo when no data is named."""
    if config is not None:
        return read(find(config))
    if given.get("data", "factbook") != "factbook":
        return {}
    render.say("demo data: settings of configs/runs/demo.yaml where no flag is given")
    return {k: v for k, v in read(shipped()["demo"]).items() if k not in {"lr", "model"}}


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"seeds {text!r} are no whole numbers; write --seeds 0,1,2") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise UserError(f"seeds {text!r}: each once, none negative; write --seeds 0,1,2")
    return found


def _tables(found: dict[str, Any]) -> list[Any]:
    from lowmem import report

    return renderables(report.build(found))
