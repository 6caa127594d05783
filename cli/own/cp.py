"""`lowmem cp RECIPE|CONFIG DEST`: take a recipe or a configuration and make it your own."""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import UserError, nearest

from .. import render
from .._configs import shipped
from ..app import Json


def _names() -> list[str]:
    """For the shell's completion."""
    return list(_copyable())


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|CONFIG",
            help="For example finetune; without one: list them.",
            autocompletion=_names,
        ),
    ] = None,
    dest: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder to copy to.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe (Python) or a run configuration (YAML) to edit it; without a name list them."""
    known = _copyable()
    if name is None:
        listed = [{"name": key, "kind": _kind(file), "about": _about(file)} for key, file in known.items()]
        rows = [tuple(entry.values()) for entry in listed]
        render.emit(listed, render.table("", ["name", "kind", "what it is"], rows), as_json)
        return
    if name not in known:
        raise UserError(f"no recipe or config {name!r}; {nearest(name, known)}")
    if dest is None:
        raise UserError(f"missing argument DEST: lowmem cp {name} DEST, a file or a folder")
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


def _kind(file: Path) -> str:
    return "recipe" if file.suffix == ".py" else "config"


def _about(file: Path) -> str:
    """The first sentence of a recipe's docstring, or of the comment that a configuration begins with."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].rstrip(".:")
    told = [line.strip("# ") for line in text.splitlines() if line.startswith("#")]
    return " ".join(filter(None, told[1:])).partition(". ")[0].rstrip(".:")  # the first is how to run it
