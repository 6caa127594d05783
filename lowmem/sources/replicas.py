"""Several processes that hold the same weights and share a batch: they exchange values of the loss.

Each evaluates the same points on its own rows; a point's loss is the mean over
the processes, as their gradients would be averaged. All gather all values and
add them in the same order, so that every process steps by the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, distributed


def count() -> int:
    """Processes that share the batch; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def mean(values: Tensor) -> Tensor:
    """The mean of each value over the processes; one that is not finite anywhere is not finite for all.

    Args:
        values: fp64, the same number of them in every process.
    """
    size = count()
    if size == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(size)]
    distributed.all_gather(gathered, values.contiguous())
    return torch.stack(gathered).sum(0) / size


def agree(text: str, device: torch.device) -> bool:
    """Whether all processes say the same; the device is where they exchange it."""
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    said = mean(torch.tensor([word >> 28, word & 0xFFFFFFF], dtype=torch.float64, device=device))
    return said.tolist() == [word >> 28, word & 0xFFFFFFF]
