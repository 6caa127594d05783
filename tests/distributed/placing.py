"""Models and tensors whose rows are spread over the ranks of a mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.distributed.zoo import Zoo


def sharded(dtype: torch.dtype, mesh: Any) -> Zoo:
    """The zoo, its rows spread."""
    model = Zoo().to(dtype)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "nothing was sharded"
    return model


def rows(whole: torch.Tensor, p: Any) -> torch.Tensor:
    """The rows of a tensor that this rank holds of a parameter."""
    return spread(whole, p).to_local()


def spread(whole: torch.Tensor, like: Any) -> Any:
    """A tensor that every rank has, placed like a parameter."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
