"""`lowmem env`: versions and devices, for a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from .. import render
from ..app import Json

_PACKAGES = (
    *(
        "lowmem",
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "tokenizers",
        "safetensors",
    ),
    *("bitsandbytes", "torchao", "triton", "gguf", "huggingface_hub", "typer"),
)
# Read by torch and Hugging Face packages; none of them holds a secret.
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"),
)


def command(as_json: Json = False) -> None:
    """Print versions and devices, for a bug report."""
    document = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": _memory(),
        **_torch(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    plain = [(key, value) for key, value in document.items() if not isinstance(value, (dict, list))]
    rows = [(key, render.size(value) if key.endswith("_bytes") else value) for key, value in plain]
    rows += [(f"device {at}", _device(card)) for at, card in enumerate(document["devices"])]
    rows += list(document["packages"].items()) + list(document["variables"].items())
    render.emit(document, render.table("", ["what", "found"], rows), as_json)


def _version(name: str) -> str | None:
    """The installed version, None where the package is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    """Bytes of main memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _torch() -> dict[str, Any]:
    """What torch sees: its own version of CUDA or ROCm, threads, and each device."""
    import torch

    backend: Any = torch.version
    cards = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return {
        "cuda": backend.cuda,
        "rocm": backend.hip,
        "threads": torch.get_num_threads(),
        "mps": torch.backends.mps.is_available(),
        "devices": [
            {"name": c.name, "memory_bytes": c.total_memory, "capability": f"{c.major}.{c.minor}"}
            for c in cards
        ],
    }


def _device(card: dict[str, Any]) -> str:
    return f"{card['name']}, {render.size(card['memory_bytes'])}, capability {card['capability']}"
