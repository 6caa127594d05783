"""One optimizer step of every method and of every peer that is installed, on the same weights."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .part import Part, clean, llama, milliseconds, model_of


def copy_bandwidth(device: str, small: bool) -> float:
    """Bytes a second of a large copy, read and written."""
    import torch

    source = torch.ones((1 << 22) if small else (1 << 28), device=device)
    target = torch.empty_like(source)
    seconds = 1e-3 * milliseconds(lambda: target.copy_(source), device, 10)
    return float(2 * source.numel() * source.element_size() / seconds)


def peers() -> dict[str, Callable[[Any], Any]]:
    """Optimizers of other libraries, made from a list of parameters."""
    import torch

    def of(module: str, name: str, **options: Any) -> Callable[[Any], Any]:
        return lambda params: getattr(importlib.import_module(module), name)(params, lr=1e-5, **options)

    def galore(params: Any) -> Any:
        flat = [p for p in params if p.dim() < 2]
        group = {"rank": 128, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": flat}, {"params": [p for p in params if p.dim() == 2], **group}]
        return importlib.import_module("galore_torch").GaLoreAdamW(groups, lr=1e-5)

    adafactor = {"scale_parameter": False, "relative_step": False}
    return {
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
        "bitsandbytes AdamW8bit": of("bitsandbytes.optim", "AdamW8bit"),
        "bitsandbytes PagedAdamW8bit": of("bitsandbytes.optim", "PagedAdamW8bit"),
        "torchao AdamW8bit": of("torchao.optim", "AdamW8bit"),
        "torchao AdamW4bit": of("torchao.optim", "AdamW4bit"),
        "flashoptim FlashAdamW": of("flashoptim", "FlashAdamW"),
        "galore-torch GaLoreAdamW": galore,
        "transformers Adafactor": of("transformers.optimization", "Adafactor", **adafactor),
    }


FIRST = ("adamw_8bit", "adamw", "galore", "adafactor")
"""Methods that others have too: what matters most comes first."""


OFFLOADED = ("adamw", "adamw_8bit")
"""Methods that step with their state in host memory as well."""


def by_gradient(words: str) -> list[str]:
    """Our methods that step by a gradient: those named, all of them, or by default one of each family."""
    import lowmem

    found = {n: e for n, e in lowmem.available().items() if _told_nothing_else(lowmem.create(n))}
    if words == "all":
        return [*FIRST, *(name for name in found if name not in FIRST)]
    if words:
        return [lowmem.create(name).name for name in words.split(",")]
    families = {found[name].family for name in FIRST}
    others = {e.family: name for name, e in reversed(found.items()) if e.family not in families}
    return [*FIRST, *sorted(others.values())]


def told_more() -> list[str]:
    """Methods with gradients that ask for a loss or a probe beside them."""
    import lowmem

    made = {name: lowmem.create(name) for name in lowmem.available()}
    return [name for name, one in made.items() if one.source.needs_autograd and one.asks]


def _told_nothing_else(strategy: Any) -> bool:
    return bool(strategy.source.needs_autograd) and not strategy.asks


def contestants(model: Any, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Our methods and the peers, in an order that puts what matters first."""
    import lowmem

    compiles = "on" if next(model.parameters()).is_cuda else "off"  # to compile for a CPU takes minutes
    ours: dict[str, Callable[[], Any]] = {
        f"lowmem {name}": partial(lowmem.optimizer, model, name, lr=1e-5, compile=compiles) for name in names
    }
    if compiles == "on":
        away = partial(lowmem.optimizer, model, lr=1e-5, offload_state=True)
        ours |= {f"lowmem {name} offloaded": partial(away, name) for name in OFFLOADED if name in names}
    trained = [p for p in model.parameters() if p.requires_grad]
    others = {name: partial(make, trained) for name, make in peers().items()}
    leading = {f"lowmem {name}" for name in FIRST}
    return {k: v for k, v in ours.items() if k in leading} | others | ours


def steps(part: Part) -> None:
    """One optimizer step of everybody on the same weights, and on a set of adapters."""
    device, small = part.args.device, part.args.small
    bandwidth = copy_bandwidth(device, small)
    part.found["copy_bytes_per_second"] = bandwidth
    names = by_gradient(part.args.methods)
    everything = by_gradient("all")
    for name in (name for name in everything if name not in names):
        part.skip(f"lowmem {name}", "not asked for: see --methods")
    for name in OFFLOADED if device != "cuda" else ():
        part.skip(f"lowmem {name} offloaded", "a CPU has one memory")
    for name in told_more():
        part.skip(f"lowmem {name}", "asks for more than gradients")
    for shape, dtype in (("weights", "bfloat16"), ("adapters", "float32"), ("weights", "float32")):
        model = model_of(llama("small" if small else "1.1B"), device, dtype)
        if shape == "adapters":
            model = adapters(model)
        for p in model.parameters():
            p.grad = p.detach().clone().mul_(0.1) if p.requires_grad else None
        for name, make in contestants(model, names).items():
            if part.late or (small and name.startswith("torchao")):
                why = "no time left" if part.late else "compiles for minutes on a CPU"
                part.skip(f"{name}, {shape} {dtype}", why)
                continue
            with part.trying(f"{name}, {shape} {dtype}"):
                part.row(
                    name=name, shape=shape, dtype=dtype, **one_step(model, make(), device, bandwidth, small)
                )
        del model
        clean(device)


def adapters(model: Any) -> Any:
    """LoRA adapters of rank 16 on every linear layer, as a bag of parameters."""
    import torch
    from torch import nn

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    pairs = [
        (nn.Linear(m.in_features, 16, bias=False), nn.Linear(16, m.out_features, bias=False)) for m in layers
    ]
    bag = nn.ModuleList([part for pair in pairs for part in pair])
    return bag.to(layers[0].weight.device, torch.float32)


def one_step(model: Any, optimizer: Any, device: str, bandwidth: float, small: bool) -> dict[str, Any]:
    """Times, bytes above weights and gradients, and the share of the card's copy bandwidth."""
    import torch

    began = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(2):
        optimizer.step()
    params = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in params)
    state = state_bytes(optimizer)
    above = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        above = torch.cuda.max_memory_allocated() - 2 * weights
    taken = milliseconds(optimizer.step, device, 3 if small else 20)
    moved = 3 * weights + 2 * state  # weights read and written, gradients read, state read and written
    return {
        "milliseconds": taken,
        "first_step_seconds": first,
        "state_bytes": state,
        "peak_above_weights_and_gradients": above,
        "share_of_copy_bandwidth": moved / (1e-3 * taken) / bandwidth,
    }


def state_bytes(optimizer: Any) -> int:
    """Bytes of tensors in an optimizer's state."""
    if hasattr(optimizer, "state_bytes"):
        return int(optimizer.state_bytes())
    import torch

    found = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in found)
