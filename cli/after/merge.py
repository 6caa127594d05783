"""`lowmem merge ADAPTER DEST`: one ordinary model out of an adapter and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import render
from ..app import Json
from ._model import Base, Dtype


def command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of a run that trained an adapter.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="New folder for the whole model.")],
    base: Base = None,
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base: the folder then loads like any model."""
    from lowmem.models.adapters import merge
    from lowmem.models.quiet import quiet

    with quiet():
        named = merge(adapter, dest, dtype=dtype, base=base)
    document = {"adapter": adapter, "base": named, "destination": dest, "dtype": dtype}
    text = f"wrote {dest}: {named} with {adapter} merged in; try it: lowmem chat --model {dest}"
    render.emit(document, text, as_json)
