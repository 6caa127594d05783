"""What the parts share: the document they write row by row, models of a size, and the clock."""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowmem.errors import first_line

SHARES = {"tests": 170, "methods": 170, "calibrate": 20, "steps": 150, "plan": 90, "train": 60, "fit": 50}
"""Seconds of each part; 540 together, as the first two go on side by side."""
BESIDE = ("tests", "methods")

Step = Callable[[], object]


@dataclass
class Part:
    """What one part has found so far; every change is written at once."""

    name: str
    args: argparse.Namespace
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=lambda: {"rows": [], "left_out": []})

    @property
    def late(self) -> bool:
        """Whether the part's share of the time is used up."""
        return time.monotonic() - self.began > SHARES[self.name] - 10

    def row(self, **values: Any) -> None:
        """Keep one row."""
        self.found["rows"].append(values)
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Name what is left out, and why."""
        self.found["left_out"].append(f"{what}: {why}")
        self.write()

    def write(self) -> None:
        """Put the part into the document; a reader never sees half of it."""
        path: Path = self.args.output
        about = machine(self.args.device)
        with path.with_suffix(".lock").open("w") as lock:  # another part may be at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = read(path)
            self.found["seconds"] = round(time.monotonic() - self.began, 1)
            document["machine"] = about
            document["parts"][self.name] = self.found
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, path)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """One row that may fail without taking the others along."""
        try:
            yield
        except ImportError as error:
            self.skip(what, str(error))
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {first_line(error)}"[:300])
        clean(self.args.device)


def read(path: Path) -> dict[str, Any]:
    """The document so far."""
    if not path.is_file():
        return {"parts": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": card,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def clean(device: str) -> None:
    """Give back what the last row held."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def llama(size: str) -> Any:
    """A Llama's configuration by its number of parameters; "small" is for machines without a GPU."""
    from transformers import LlamaConfig

    width, inner, layers, heads, keys = {
        "small": (64, 176, 2, 4, 2),
        "0.6B": (1280, 3456, 24, 20, 4),
        "1.1B": (2048, 5632, 22, 32, 4),
        "2.7B": (2560, 6912, 32, 20, 20),
    }[size]
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=512 if size == "small" else 32000, max_position_embeddings=8192,
        use_cache=False,
    )  # fmt: skip


def model_of(config: Any, device: str, dtype: str, checkpointing: bool = False) -> Any:
    """A model with random weights, made where it will live."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def milliseconds(step: Step, device: str, times: int) -> float:
    """Median time of a step: CUDA events on a GPU, the host's clock elsewhere."""
    import torch

    found = []
    for _ in range(times):
        if device == "cuda":
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            step()
            found.append(1e3 * (time.perf_counter() - started))
    return float(statistics.median(found))


def stepping(model: Any, name: str, released: bool, batch: int, length: int) -> tuple[Any, Step]:
    """An optimizer over a model and a whole training step on the same random tokens."""
    import torch

    import lowmem
    from lowmem.optim.release import release

    optimizer = lowmem.optimizer(model, name, lr=1e-5)
    if released:
        release(optimizer)
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)

    def loss() -> Any:
        return model(input_ids=ids, labels=ids).loss

    def step() -> None:
        if optimizer.probe_due:
            optimizer.probe(model(input_ids=ids).logits)
        optimizer.backward(loss, model)
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step
