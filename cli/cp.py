"""`lowmem cp RECIPE|CONFIG DEST`: take a recipe or a configuration and make it your own."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import UserError, nearest

from . import render
from ._configs import shipped
from .app import Json


def command(
    name: Annotated[str, typer.Argument(metavar="RECIPE|CONFIG", help="For example finetune, or demo.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="File or folder to copy to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe (Python) or a run configuration (YAML) to edit it."""
    known = _copyable()
    if name not in known:
        raise UserError(f"no recipe or config {name!r}; {nearest(name, known)}")
    source = known[name]
    target = dest / source.name if dest.is_dir() else dest
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{target} exists; choose another DEST or give --overwrite")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {str(target.parent)!r}; create it first")
    with tempfile.TemporaryDirectory(prefix=".lowmem.", dir=target.parent) as beside:
        shutil.copyfile(source, whole := Path(beside) / target.name)
        os.replace(whole, target)  # of a link, the link itself
    use = f"python {target} --help" if source.suffix == ".py" else f"lowmem finetune --config {target}"
    render.emit({"source": name, "destination": target}, f"wrote {target}; run it: {use}", as_json)


def _copyable() -> dict[str, Path]:
    """Recipes and shipped run configurations by name."""
    recipes = Path(str(resources.files("lowmem.recipes")))
    files = [file for file in sorted(recipes.glob("*.py")) if not file.name.startswith("_")]
    return {**shipped(), **{file.stem: file for file in files}}
