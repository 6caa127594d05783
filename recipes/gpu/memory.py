"""What the card takes, what the plan says and what a run took, and which model fits under a cap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .part import Part, clean, llama, model_of, stepping

GIB = 1 << 30


def calibrate(part: Part) -> None:
    """What `lowmem calibrate` measures; the plan of this machine then uses it."""
    from lowmem.memory.device import calibrate as calibration

    if part.args.device != "cuda":
        part.skip("calibrate", "a CPU has no context")
        return
    measured = calibration.calibrate()
    calibration.save(measured)
    part.row(**measured.to_dict())


def cells(small: bool) -> list[dict[str, Any]]:
    """Model x method x checkpointing x release x batch; every second one is never used for tuning."""
    found: list[tuple[str, str, bool, bool, int, int]] = []
    for name in ("galore", "mezo") if small else ("adamw", "adamw_8bit", "galore", "adafactor", "mezo"):
        plain = name == "mezo"  # nothing to recompute, nothing to release
        found.append(("small" if small else "0.6B", name, False, False, 2, 64 if small else 1024))
        found.append(("small" if small else "1.1B", name, not plain, not plain, 4, 32 if small else 2048))
    if not small:
        found.append(("2.7B", "adamw_8bit", True, False, 1, 1024))
        found.append(("2.7B", "galore", False, True, 1, 1024))
        found.append(("2.7B", "adafactor", True, True, 2, 2048))
    names = ("model", "strategy", "checkpointing", "release", "batch_size", "seq_len")
    return [dict(zip(names, cell, strict=True), held_out=bool(i % 2)) for i, cell in enumerate(found)]


def plan(part: Part) -> None:
    """Predicted beside measured."""
    for cell in cells(part.args.small):
        what = " ".join(str(cell[name]) for name in ("model", "strategy", "batch_size", "seq_len"))
        if part.late:
            part.skip(what, "no time left")
            continue
        with part.trying(what):
            predicted, event = foretold(cell, part.args.device)
            measured = observed(cell, part.args.device)
            errors = {
                key: round(100 * (predicted[key] / measured[key] - 1), 3)
                for key in measured
                if predicted.get(key) and measured[key]
            }
            part.row(**cell, event=event, predicted=predicted, measured=measured, error_percent=errors)


def foretold(cell: Mapping[str, Any], device: str) -> tuple[dict[str, Any], str]:
    """What the plan says of a cell."""
    import torch

    import lowmem
    from lowmem.memory.device.calibrate import card_name
    from lowmem.memory.device.gpus import available_gpus

    limit: dict[str, Any] = {}
    if device == "cuda":
        card = card_name(torch.cuda.get_device_name())
        limit = {"gpu": card} if card in available_gpus() else {"budget": torch.cuda.mem_get_info()[1]}
    found = lowmem.plan(
        llama(cell["model"]), cell["strategy"], batch_size=cell["batch_size"], seq_len=cell["seq_len"],
        dtype="bfloat16", device=device, gradient_checkpointing=cell["checkpointing"],
        gradient_release=cell["release"], max_grad_norm=0.0, advise=False, **limit,
    ).plans[0]  # fmt: skip
    return dict(found.peak), found.event


def observed(cell: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What a second real step takes, by the allocator or, without one, by the tracker."""
    import torch

    from lowmem.memory.measure.profile import profile

    outside = used() - torch.cuda.memory_reserved() if device == "cuda" else 0
    model = model_of(llama(cell["model"]), device, "bfloat16", cell["checkpointing"])
    optimizer, step = stepping(model, cell["strategy"], cell["release"], cell["batch_size"], cell["seq_len"])
    if device != "cuda":
        found = profile(step, model, optimizer, steps=2)
        return {"allocated": found.measured["peak"]["allocated"]}
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(), "reserved": reserved, "device": reserved + outside
    }  # fmt: skip


def used() -> int:
    """Bytes in use on the card, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def fit(part: Part) -> None:
    """The largest model under a cap, by the plan; then run there, and one notch above."""
    import torch

    from lowmem.memory.device.gpus import budget

    small, device = part.args.small, part.args.device
    for cap in (1,) if small else (8, 12, 16, 24):
        if part.late:
            part.skip(f"{cap} GiB", "no time left")
            continue
        with part.trying(f"{cap} GiB"):
            layers = deepest(cap * GIB, 4 if small else 160, small)
            row: dict[str, Any] = {"cap_gib": cap, "layers": layers, "planned": "fits"}
            if device == "cuda":
                total = torch.cuda.mem_get_info()[1]
                room = cap * GIB - budget(cap * GIB).outside
                torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
                row["ran"] = runs(layers, small, device)
                row["one_notch_above_ran"] = runs(layers + max(1, layers // 12), small, device)
                torch.cuda.set_per_process_memory_fraction(1.0)
            part.row(**row)
    if device != "cuda":
        part.skip("running under a cap", "a CPU has no cap")


STRATEGY, BATCH, LENGTH = "adamw_8bit", 1, 1024


def deep(layers: int, small: bool) -> Any:
    """The 1.1B model with another number of layers."""
    config = llama("small" if small else "1.1B")
    config.num_hidden_layers = layers
    return config


def deepest(cap: int, most: int, small: bool) -> int:
    """The largest number of layers that the plan lets in, by bisection."""
    import lowmem

    least = 1
    while least < most:
        middle = (least + most + 1) // 2
        found = lowmem.plan(
            deep(middle, small), STRATEGY, batch_size=BATCH, seq_len=LENGTH,
            budget=cap, gradient_checkpointing=True, gradient_release=True, max_grad_norm=0.0, advise=False,
        )  # fmt: skip
        least, most = (middle, most) if found.plans[0].fits else (least, middle - 1)
    return least


def runs(layers: int, small: bool, device: str) -> bool:
    """Whether three steps go through."""
    import torch

    try:
        model = model_of(deep(layers, small), device, "bfloat16", checkpointing=True)
        step = stepping(model, STRATEGY, True, BATCH, LENGTH)[1]
        for _ in range(3):
            step()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        clean(device)
