"""`lowmem strategies [NAME]`: what can be chosen with `--optim`, and its options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowmem.errors import UserError, nearest

from . import render
from .app import Json


def command(
    name: Annotated[str | None, typer.Argument(help="Show one strategy with its options.")] = None,
    as_json: Json = False,
) -> None:
    """List the strategies, or show one with its options."""
    from lowmem.strategies import available

    entries = available()
    if name is None:
        document = [_summary(entries[key]) for key in sorted(entries)]
        rows = [(d["name"], d["summary"], d["paper"]) for d in document]
        render.emit(document, render.table("", ["strategy", "what it does", "paper"], rows), as_json)
        return
    if name not in entries:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, entries)}")
    document_one = _detail(entries[name])
    render.emit(document_one, _detail_table(document_one), as_json)


def _summary(entry: Any) -> dict[str, Any]:
    return {"name": entry.name, "summary": entry.summary, "paper": entry.paper}


def _detail(entry: Any) -> dict[str, Any]:
    options = [
        {
            "name": option.name,
            "type": option.type.__name__,
            "default": option.default,
            "choices": list(option.choices) if option.choices else None,
            "help": option.help,
        }
        for option in entry.options.values()
    ]
    return {**_summary(entry), "options": options}


def _detail_table(document: dict[str, Any]) -> list[Any]:
    rows = [
        (o["name"], "|".join(map(str, o["choices"])) if o["choices"] else o["type"], o["default"], o["help"])
        for o in document["options"]
    ]
    head = f"{document['name']}: {document['summary']} ({document['paper']})"
    use = f"lowmem finetune --model MODEL --optim {document['name']}"
    if not rows:
        return [head, "no options", use]
    use += f" --optim-args {rows[0][0]}={rows[0][2]},..."
    return [head, render.table("", ["option", "values", "default", "meaning"], rows, right=["default"]), use]
