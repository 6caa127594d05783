"""`lowmem replay`: the weights of a run without gradients, from its base model and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import render
from ..app import Json, Plugins


def command(
    model: Annotated[str, typer.Option("--model", help="The base model that the run began with.")],
    log: Annotated[Path, typer.Option("--log", help="zo_log.safetensors of the run.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder to write, not there yet.")],
    steps: Annotated[
        int | None, typer.Option("--steps", help="Stop after so many; all when not given.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Rebuild the final weights of a run without gradients, bit for bit, from its log."""
    from lowmem.models.quiet import quiet
    from lowmem.outside import bring
    from lowmem.training.zeroth.replay import replay

    from .._progress import Bars

    bring(plugin or ())
    with quiet(), Bars() as progress:
        result = replay(model, log, output_dir, steps=steps, console=progress)
    rows = [
        ("steps taken again", f"{result['steps']} of {result['strategy']}"),
        ("SHA-256 of the weights", result["sha256"]),
        ("written to", result["output_dir"]),
    ]
    render.emit(result, None if as_json else [render.table("", [str(model), ""], rows)], as_json)
