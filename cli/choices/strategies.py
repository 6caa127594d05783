"""`lowmem strategies [NAME] [--parts]`: what can be chosen with `--optim`, and with its options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from lowmem.errors import UserError

from .. import render
from ..app import Json, Plugins

_SHAPE = (4096, 11008)  # a weight of a 7B model; state is counted for it, in bfloat16


def command(
    name: Annotated[
        str | None, typer.Argument(help="Show one strategy, or module:factory, with its options.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="List the parts that every axis may take.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the strategies or the parts, or show one strategy with its options."""
    from lowmem.outside import bring
    from lowmem.strategies import available
    from lowmem.strategies.registry import entry

    bring(plugin or ())
    entries = available()
    one = entry(name) if name is not None else None
    if name is not None and parts:
        raise UserError(f"--parts lists what every strategy may take; leave {name} or --parts out")
    if parts:
        listed = _parts()
        render.emit(listed, _parts_tables(listed), as_json)
    elif one is not None:
        detail = _detail(one)
        render.emit(detail, _detail_table(detail), as_json)
    elif markdown:
        summaries = [_summary(entry) for entry in entries.values()]
        render.emit(summaries, _markdown(summaries), as_json)
    else:
        summaries = [_summary(entry) for entry in entries.values()]
        render.emit(summaries, _table(summaries), as_json)


def _summary(entry: Any) -> dict[str, Any]:
    """What the lists show; state bytes are those of a bfloat16 weight of `_SHAPE` with default options."""
    import torch

    from lowmem.memory.count import state_bytes
    from lowmem.strategies import create

    state = state_bytes(create(entry.name), _SHAPE, torch.bfloat16)
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": entry.summary,
        "paper": entry.paper,
        "state_bytes": state,
        "shape": list(_SHAPE),
    }


def _table(documents: list[dict[str, Any]]) -> list[Any]:
    columns = ["strategy", "what it does", "state bytes per weight", "paper"]
    width = max(len(d["name"]) for d in documents)
    tables = []
    for family, found in _families(documents).items():
        rows = [(d["name"].ljust(width), d["summary"], _per_weight(d), d["paper"]) for d in found]
        tables.append(render.table(family, columns, rows, right=[columns[2]]))
    note = (
        "lowmem strategies NAME shows the axes and options of one, --parts what every axis may be; all take "
        "bfloat16 and float32 weights."
    )
    return [*tables, note]


def _families(documents: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        found.setdefault(document["family"], []).append(document)
    return dict(sorted(found.items()))


def _per_weight(document: dict[str, Any]) -> str:
    return f"{document['state_bytes'] / (_SHAPE[0] * _SHAPE[1]):.3g}"


def _option(option: Any) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": "number or share" if option.limits.size else option.type.__name__,
        "default": option.default,
        "choices": list(option.choices) if option.choices else None,
        "help": option.help,
    }


def _detail(entry: Any) -> dict[str, Any]:
    """One strategy: its axes with what each may be, and the options of the parts that it comes with."""
    options = [_option(option) for option in entry.options.values()]
    axes = [option for option in options if option["name"] in entry.axes]
    others = [option for option in options if option["name"] not in entry.axes]
    advice = [{"purpose": a.purpose, "source": a.source, "values": dict(a.values)} for a in entry.recommended]
    from lowmem.report.quality import measured

    known = {"recommended": advice, "measured": measured(entry.name)}
    return {**_summary(entry), "doc": entry.doc, **known, "axes": axes, "options": others}


def _rows(options: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            o["name"],
            " | ".join(map(str, o["choices"])) if o["choices"] else o["type"],
            "as states" if o["default"] == "" else o["default"],
            o["help"],
        )
        for o in options
    ]


def _detail_table(document: dict[str, Any]) -> list[Any]:
    bytes_held = f"{_per_weight(document)} bytes of state per weight of a {_SHAPE[0]} x {_SHAPE[1]} matrix"
    axes = render.table("", ["axis", "parts", "default", "meaning"], _rows(document["axes"]))
    options = render.table("", ["option", "values", "default", "meaning"], _rows(document["options"]))
    example = next(iter([*document["options"], *document["axes"]]), None)
    args = f" --optim-args {example['name']}={example['default']},..." if example else ""
    paper = f" ({document['paper']})" if document["paper"] else ""
    roles = [
        "embedding=, head= and vector= (norms, biases) take a rule of their own, as in embedding=adafactor; "
        "lowmem strategies --parts shows the options of the other parts",
    ]
    return [
        f"{document['name']}{paper}: {document['doc']}\n\n{bytes_held} in bfloat16",
        *_advice(document["recommended"]),
        *_measured(document["measured"]),
        *([axes] if document["axes"] else []),
        *([options] if document["options"] else []),
        *(roles if document["axes"] else []),
        f"lowmem finetune --model MODEL --optim {document['name']}{args}",
    ]


def _advice(recommended: list[dict[str, Any]]) -> list[Any]:
    rows = [
        (a["purpose"], ", ".join(f"{key}={value}" for key, value in a["values"].items()), a["source"])
        for a in recommended
    ]
    return [render.table("", ["recommended for", "values", "by"], rows)] if rows else []


def _measured(found: list[dict[str, Any]]) -> list[Any]:
    from lowmem.report.quality import TOLD, told

    return [render.table("", list(TOLD), [told(row) for row in found])] if found else []


def _parts() -> dict[str, list[dict[str, Any]]]:
    from lowmem.strategies.parts import KINDS, parts

    return {
        kind: [
            {"name": p.name, "summary": p.summary, "options": [_option(o) for o in p.options.values()]}
            for p in parts(kind).values()
        ]
        for kind in KINDS
    }


def _parts_tables(listed: dict[str, list[dict[str, Any]]]) -> list[Any]:
    rows = [
        (kind, p["name"], p["summary"], ", ".join(f"{o['name']}={o['default']}" for o in p["options"]))
        for kind, found in listed.items()
        for p in found
    ]
    note = (
        "Written as in --optim-args projector=columns,rule=adafactor,rank=0.25; a name that two chosen parts "
        "share is written with the axis before it, as in residual_scale."
    )
    return [render.table("", ["axis", "part", "what it does", "options"], rows), note]


def _markdown(documents: list[dict[str, Any]]) -> str:
    lines = ["| strategy | what it does | state bytes per weight | paper |", "|---|---|---|---|"]
    for family, found in _families(documents).items():
        lines.append(f"| **{family}** | | | |")
        for d in found:
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
