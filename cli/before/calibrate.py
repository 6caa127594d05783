"""`lowmem calibrate`: measure this GPU once, for plan."""

from __future__ import annotations

from .. import render
from ..app import Json


def command(as_json: Json = False) -> None:
    """Measure this GPU once (context, library workspaces), so that plan need not assume them."""
    from lowmem.memory.device.calibrate import calibrate, save

    measured = calibrate()
    path = save(measured)
    rows = [
        ("card", f"{measured.name} ({measured.device})"),
        ("usable", render.size(measured.usable)),
        ("CUDA context", render.size(measured.context)),
        ("library workspaces", render.size(measured.workspace)),
        ("held by other processes", render.size(measured.others)),
        ("torch", measured.torch),
        ("written to", str(path)),
    ]
    render.emit(
        {**measured.to_dict(), "file": str(path)}, render.table("", ["calibration", ""], rows), as_json
    )
