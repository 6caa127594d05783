"""`lowmem validate CONFIG`: every problem of a run configuration, without running it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from lowmem.config import load
from lowmem.errors import ConfigError, UserError

from .. import render
from .._configs import find, problems
from ..app import Json


def command(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped configuration.")],
    as_json: Json = False,
) -> None:
    """Check a run configuration: names, types, ranges, options, combinations."""
    found: list[str] = []
    resolved: dict[str, Any] | None = None
    try:
        resolved = dataclasses.asdict(load(find(config), problems))
    except ConfigError as error:
        found = error.problems
    except UserError as error:
        found = [str(error)]
    document = {"config": config, "valid": not found, "problems": found, "resolved": resolved}
    render.emit(document, None if found else f"{config}: valid", as_json)
    if found:
        for problem in found:
            render.error(problem)
        raise typer.Exit(2)
