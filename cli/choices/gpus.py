"""`lowmem gpus`: the cards that `lowmem plan --gpu` knows."""

from __future__ import annotations

from .. import render
from ..app import Json


def command(as_json: Json = False) -> None:
    """List the cards that `lowmem plan --gpu` knows, and which of them were measured here."""
    from lowmem.memory.device.gpus import available_gpus

    document = [{**card.to_dict(), "capacity": card.capacity} for card in available_gpus().values()]
    rows = [
        (
            card["name"],
            render.size(card["usable"]),
            render.size(card["capacity"]),
            "measured here" if card["calibrated"] else "estimate" if card["estimated"] else "table",
        )
        for card in document
    ]
    table = render.table("", ["GPU", "usable", "for tensors", "from"], rows, right=["usable", "for tensors"])
    note = "usable: what torch sees; for tensors: less the CUDA context and library workspaces."
    render.emit(document, [table, f"{note}\nlowmem calibrate measures the card at hand."], as_json)
