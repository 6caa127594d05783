"""`lowmem models`: the models that go by a short name."""

from __future__ import annotations

from .. import render
from ..app import Json


def command(as_json: Json = False) -> None:
    """List the models that `--model` knows by name; a folder or a Hub id works too."""
    from lowmem.models.entries import available_models

    document = [
        {"name": entry.name, "hub_id": entry.hub_id, "parameters": entry.parameters}
        for entry in available_models().values()
    ]
    rows = [(d["name"], _billions(d["parameters"]), d["hub_id"]) for d in document]
    table = render.table("", ["model", "parameters", "Hub id"], rows, right=["parameters"])
    note = "A local folder or any other Hub id works as well: --model ./my-model, --model owner/name"
    render.emit(document, [table, note], as_json)


def _billions(count: object) -> str | None:
    if not isinstance(count, int):
        return None
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
