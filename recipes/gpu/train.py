"""Whole training steps: tokens a second of every contestant, and the optimizer's share of the time."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

from .part import SHARES, Part, llama, milliseconds, model_of
from .steps import by_gradient, contestants


def train(part: Part) -> None:
    """The demo job, or a random model of 1.1B parameters."""
    if part.args.model:
        demo(part)
        return
    small, device = part.args.small, part.args.device
    batch, length, count = (2, 32, 3) if small else (4, 1024, 200)
    names = contested(part.args.methods)
    names = names[:2] if small else names
    seconds = SHARES["train"] / len(names)
    for name in names:
        if part.late:
            part.skip(name, "no time left")
            continue
        with part.trying(name):
            part.row(
                name=name,
                batch_size=batch,
                seq_len=length,
                **trained(name, device, small, batch, length, count, seconds),
            )


def contested(methods: str) -> list[str]:
    """Who trains: torch's fused AdamW, and ours that are asked for, by default one of each family."""
    return ["torch AdamW fused", *(f"lowmem {name}" for name in by_gradient(methods))]


def trained(
    name: str, device: str, small: bool, batch: int, length: int, count: int, seconds: float
) -> dict[str, Any]:
    """Steps of one method on random tokens, so many or as many as there is time for after the warm-up.

    The first few warm up and are not counted.
    """
    import torch

    model = model_of(llama("small" if small else "1.1B"), device, "bfloat16")
    ours = [name.removeprefix("lowmem ")] if name.startswith("lowmem ") else []
    optimizer = contestants(model, ours)[name]()
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    stepped: list[float] = []
    began, warm = time.perf_counter(), max(1, min(5, count // 10))
    last = began + seconds
    for done in range(count):
        if done > warm and time.perf_counter() > last:
            break
        if done == warm:
            stepped.clear()
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        stepped.append(milliseconds(optimizer.step, device, 1))
        optimizer.zero_grad()
    taken = time.perf_counter() - began
    return {
        "steps": len(stepped),
        "tokens_per_second": batch * length * len(stepped) / taken,
        "optimizer_percent": 100 * 1e-3 * sum(stepped) / taken,
        "loss": float(loss),
    }


def demo(part: Part) -> None:
    """The main job with the weights at hand."""
    from lowmem.config import build

    recipe = importlib.import_module("lowmem.recipes.finetune")
    for name in ("galore", "adamw_8bit"):
        if part.late:
            part.skip(name, "no time left")
            continue
        with part.trying(f"demo {name}"):
            folder = part.args.output.with_suffix(f".{name}")
            settings = {
                "model": str(part.args.model),
                "optim": name,
                "output_dir": str(folder),
                "overwrite": True,
            }
            part.row(name=name, result=json.loads(json.dumps(recipe.finetune(build(settings)), default=str)))
