"""Activations that wait for their backward pass in host memory, as TRL's offloading has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEAST = 1024
"""Bytes below which a tensor stays."""


class Elsewhere(NamedTuple):
    """What is left on the device of a tensor that was moved: its layout."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Meanwhile what autograd saves leaves the device, but weights, and comes back when it is asked for.

    Args:
        model: whose parameters and buffers stay.
    """
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}

    def leave(x: Tensor) -> Tensor | Elsewhere:
        stays = x.untyped_storage()._cdata in own or x.numel() * x.element_size() < LEAST
        return x if stays else Elsewhere(x.shape, x.stride(), x.dtype)

    def come(held: Tensor | Elsewhere) -> Tensor:
        if isinstance(held, Tensor):
            return held
        return torch.empty_strided(held.size, held.stride, dtype=held.dtype)

    with torch.autograd.graph.saved_tensors_hooks(leave, come):
        yield
