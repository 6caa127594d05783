"""Whether all of a tensor is finite, as its ranks see it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.optim.terms.fp32 import LARGEST
from lowmem.optim.terms.hyper import Hyper


def all_finite(x: Tensor, hp: Hyper) -> Tensor:
    """0-D bool, the same for all shards."""
    if hp.sound is not None:
        return hp.sound
    return _finite(x) if hp.shard is None else hp.total(unsound(x), "max") == 0.0


def unsound(x: Tensor) -> Tensor:
    """0-D fp32: 1 where an element is not finite, else 0."""
    return (~_finite(x)).float() if x.numel() else torch.zeros((), device=x.device)


def _finite(x: Tensor) -> Tensor:
    least, most = x.aminmax()
    return most - least <= LARGEST  # false for NaN and Inf
