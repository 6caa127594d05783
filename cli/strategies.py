"""`lowmem strategies [NAME]`: what can be chosen with `--optim`, and its options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowmem.errors import UserError, nearest

from . import render
from .app import Json

_SHAPE = (4096, 4096)  # a weight of a 7B model; state is counted for it, in bfloat16


def command(
    name: Annotated[str | None, typer.Argument(help="Show one strategy with its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    as_json: Json = False,
) -> None:
    """List the strategies, or show one with its options."""
    from lowmem.strategies import available

    entries = available()
    if name is not None and name not in entries:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, entries)}")
    if name is not None:
        detail = _detail(entries[name])
        render.emit(detail, _detail_table(detail), as_json)
        return
    document = [_summary(entry) for entry in entries.values()]
    if markdown:
        render.emit(document, _markdown(document), as_json)
        return
    columns = ["strategy", "what it does", "state bytes per weight", "paper"]
    rows = [(d["name"], d["summary"], _per_weight(d), d["paper"]) for d in document]
    note = "lowmem strategies NAME shows the options of one; all take bfloat16 and float32 weights."
    render.emit(document, [render.table("", columns, rows, right=[columns[2]]), note], as_json)


def _summary(entry: Any) -> dict[str, Any]:
    """What the lists show; state bytes are those of a bfloat16 weight of `_SHAPE` with default options."""
    import torch

    from lowmem.memory.count import state_bytes

    state = state_bytes(entry.factory(), _SHAPE, torch.bfloat16)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "state_bytes": state,
        "shape": list(_SHAPE),
    }


def _per_weight(document: dict[str, Any]) -> str:
    return f"{document['state_bytes'] / (_SHAPE[0] * _SHAPE[1]):.3g}"


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
        (
            o["name"],
            " | ".join(map(str, o["choices"])) if o["choices"] else o["type"],
            o["default"],
            o["help"],
        )
        for o in document["options"]
    ]
    head = (
        f"{document['name']} ({document['paper']}): {document['summary']}\n"
        f"{_per_weight(document)} bytes of state per weight of a {_SHAPE[0]} x {_SHAPE[1]} matrix in bfloat16"
    )
    use = f"lowmem finetune --model MODEL --optim {document['name']}"
    if rows:
        use += f" --optim-args {rows[0][0]}={rows[0][2]},..."
    return [head, render.table("", ["option", "values", "default", "meaning"], rows), use]


def _markdown(documents: list[dict[str, Any]]) -> str:
    lines = ["| strategy | what it does | state bytes per weight | paper |", "|---|---|---|---|"]
    for d in documents:
        paper = f"[{d['paper']}](https://arxiv.org/abs/{d['paper']})"
        lines.append(f"| `{d['name']}` | {d['summary']} | {_per_weight(d)} | {paper} |")
    shape = " x ".join(map(str, _SHAPE))
    return "\n".join(
        [
            *lines,
            "",
            f"State of a {shape} bfloat16 weight with default options, counted by the code that holds it.",
        ]
    )
