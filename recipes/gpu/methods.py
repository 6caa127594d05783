"""Every method on the device: compiled beside eager, and what one step of it asks of a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .part import SHARES, Part, llama, model_of

WORKERS = 6
"""Processes side by side, at most: what takes the time is compiling."""
STEPS = 4
TOLERANCE = 1e-3
"""Weights that differ by more are counted: a code or a coordinate at a boundary may fall either way."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def methods(part: Part) -> None:
    """All methods, shared out to workers that write their rows to files of their own."""
    import lowmem

    workers = 1 if part.args.small else max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    files = [part.args.output.with_suffix(f".worker{i}.jsonl") for i in range(workers)]
    running = [_start(file, i, workers) for i, file in enumerate(files)]
    last = part.began + SHARES[part.name] - 10
    for process in running:
        try:
            process.wait(max(1.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    found = [row for file in files for row in _rows(file)]
    for row in sorted(found, key=lambda row: str(row["name"])):
        part.row(**row)
    for name in sorted(set(lowmem.available()) - {row["name"] for row in found}):
        part.skip(f"lowmem {name}", "asked of no CPU" if part.args.small else "no time left")


def _start(file: Path, worker: int, workers: int) -> subprocess.Popen[bytes]:
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).parent), *sys.argv[1:], "--worker", f"{worker}/{workers}"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """What a worker has written, whole lines alone."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    file.unlink(missing_ok=True)
    yield from (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def work(share: str, output: Path, device: str, small: bool) -> None:
    """One worker's methods: a line for each as soon as it is through."""
    import lowmem

    from .steps import FIRST

    worker, workers = (int(n) for n in share.split("/"))
    names = [*FIRST, *(name for name in lowmem.available() if name not in FIRST)]
    with output.with_suffix(f".worker{worker}.jsonl").open("a", encoding="utf-8") as log:
        for name in names[:2] if small else names[worker::workers]:
            try:
                row = compared(name, device)
            except Exception as error:  # the others are still to be seen
                row = {"name": name, "error": f"{type(error).__name__}: {error}"[:600]}
            log.write(json.dumps(row) + "\n")
            log.flush()


def compared(name: str, device: str) -> dict[str, Any]:
    """A few steps compiled and eager from the same weights on the same tokens, and what one more asks for."""
    import torch

    row: dict[str, Any] = {"name": name}
    ends = {}
    for compile in ("on", "off") if device == "cuda" else ("off",):
        stepper, step = _stepping(name, device, compile)
        began = time.perf_counter()
        for i in range(STEPS):
            step(i)
            if i == 0 and device == "cuda":
                torch.cuda.synchronize()
                row[f"first_step_seconds_{compile}"] = round(time.perf_counter() - began, 2)
        if device == "cuda":
            row |= {f"{key}_{compile}": value for key, value in _asked(stepper, step).items()}
        params = [p for group in stepper.param_groups for p in group["params"]]
        row["tensors"] = len(params)
        ends[compile] = torch.cat([p.detach().float().flatten() for p in params])
        row[f"not_finite_{compile}"] = int((~torch.isfinite(ends[compile])).sum())
    if len(ends) == 2:
        off = (ends["on"] - ends["off"]).abs()
        row |= {"largest_difference": float(off.max()), "differ": float((off > TOLERANCE).float().mean())}
    return row


def _stepping(name: str, device: str, compile: str) -> tuple[Any, Any]:
    """An optimizer, and its training step on the tokens of a number."""
    import torch

    import lowmem

    torch.manual_seed(0)
    config = llama("small")
    if device == "cuda":
        config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size = (
            512,
            1376,
            128,
            4096,
        )
    model = model_of(config, device, "bfloat16")
    optimizer = lowmem.optimizer(model, name, lr=1e-4, compile=compile)

    def step(number: int, last: bool = True) -> None:
        drawn = torch.Generator().manual_seed(number)
        ids = torch.randint(config.vocab_size, (2, 64), generator=drawn).to(device)
        if optimizer.probe_due:
            optimizer.probe(model(input_ids=ids).logits)
        optimizer.backward(lambda: model(input_ids=ids, labels=ids).loss, model)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return optimizer, step


def _asked(optimizer: Any, step: Any) -> dict[str, int]:
    """Kernels, launches, copies and waits of one optimizer step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step(STEPS, last=False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        optimizer.step()
    events: Any = seen.events()
    there = [str(e.device_type).endswith("CUDA") for e in events]
    host = [str(e.name) for e, away in zip(events, there, strict=True) if not away]
    return {
        "kernels": sum(there),
        "launches": sum(name in LAUNCHES for name in host),
        "copies": sum("Memcpy" in name for name in host),
        "waits": sum("Synchronize" in name for name in host),
    }
