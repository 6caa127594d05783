"""Measure this GPU once: what CUDA takes before the first tensor, and what its libraries keep.

A tiny bf16 language model takes two training steps, so that the kernels of a real run are loaded: matrix
products in forward and in the thread of backward, flash attention, cross entropy, a fused optimizer. Then

    context    = used on the device - used by others before - held by torch's allocator
    workspace  = still allocated when every tensor is gone (cuBLAS, one for each handle and stream)

The numbers go to the file that `lowmem.memory.device.gpus` reads, under the card's name there; `plan` then
calls its device figure calibrated.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.errors import UserError
from lowmem.memory.device import gpus

MIB = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """What was measured on one card, in bytes.

    Args:
        name: of the card, as `lowmem gpus` lists it.
        usable: what torch calls its capacity.
        context: outside torch's allocator.
        workspace: of libraries, inside it.
        capability: compute capability.
        device: the driver's name of the card.
        torch: version, CUDA's included.
        others: bytes that other processes held meanwhile.
    """

    name: str
    usable: int
    context: int
    workspace: int
    capability: float
    device: str
    torch: str
    others: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def calibrate() -> Calibration:
    """Measure the current CUDA device; a fresh process that has not used it yet measures best.

    Raises:
        UserError: no CUDA GPU, or torch's allocator already holds tensors in this process.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "calibrate measures a CUDA GPU and torch finds none here; plan with --gpu NAME "
            "from `lowmem gpus`, or with --budget 23.5GiB"
        )
    if torch.cuda.memory_allocated():
        raise UserError(
            f"calibrate needs an idle process, and this one holds {torch.cuda.memory_allocated() // MIB} MiB "
            "on the GPU; run `lowmem calibrate` on its own"
        )
    others = _used_by_others()
    _two_steps()
    gc.collect()
    torch.cuda.synchronize()
    workspace = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    device = torch.cuda.get_device_name()
    context = total - free - torch.cuda.memory_reserved() - others
    return Calibration(
        name=card_name(device),
        usable=total,
        context=max(context, 0),
        workspace=workspace,
        capability=float("{}.{}".format(*torch.cuda.get_device_capability())),
        device=device,
        torch=f"{torch.__version__} (CUDA {torch.version.cuda})",
        others=others,
    )


def card_name(device: str) -> str:
    """The card's name in the table, or one made from the driver's.

    >>> card_name("NVIDIA GeForce RTX 4090")
    'rtx4090'
    """
    try:
        return gpus.gpu(device).name or device
    except UserError:
        return "-".join(device.lower().replace("nvidia", "").replace("geforce", "").split())


def save(measured: Calibration, path: Path | None = None) -> Path:
    """Put a measurement beside those of other cards; returns the file.

    Args:
        measured: from `calibrate`.
        path: instead of the file that `plan` reads.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    target = path or gpus.calibration_file()
    kept: Mapping[str, Any] = (
        json.loads(target.read_text(encoding="utf-8")) if gpus.calibrations(target) else {}
    )
    text = json.dumps({**kept, measured.name: measured.to_dict()}, indent=1)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from error
    return target


def _used_by_others() -> int:
    """Bytes in use before this process makes a context; 0 where the driver's tool does not say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return int(done.stdout.split()[0]) * MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


class _Tiny(nn.Module):
    """An embedding, one attention layer and a head: one of each kernel that fine-tuning loads."""

    def __init__(self, vocab: int = 512, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(self.embed(tokens))).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(mixed.transpose(1, 2).flatten(-2)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _two_steps() -> None:
    with torch.random.fork_rng():
        model = _Tiny().to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    tokens = torch.arange(512, device="cuda").reshape(4, 128)
    for _ in range(2):
        model(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
