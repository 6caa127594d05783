"""The loss at a displaced point where the rows of weights are spread over ranks.

FSDP2 gathers a module's weights from the rows that ranks hold, after any hook of ours. So the
rows are displaced themselves, and put back from a copy, bit for bit: a probe holds this
rank's rows twice. What is gathered already is let go before and after, or a forward pass
would see the point before. Ranks see batches of their own: the loss is their mean, the
same number on all of them, and so is the slope: one number is exchanged for a probe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.shards import local, shard_of
from lowmem.optim.source import Named


def is_spread(params: Named) -> bool:
    """Whether rows of parameters lie on several ranks."""
    return any(hasattr(p, "device_mesh") for _, p in params)


class SpreadProber:
    """Evaluates a loss at displaced points.

    Args:
        params: names and parameters that are displaced.
        model: what shards them.

    Raises:
        UserError: without a model, what is gathered cannot be let go.
    """

    def __init__(self, params: Named, model: nn.Module | None) -> None:
        if model is None:
            raise UserError("probing sharded parameters needs their model: lowmem.optimizer(model, ...)")
        self.params, self.model = params, model
        self.mesh = next(cast("Any", p).device_mesh for _, p in params if hasattr(p, "device_mesh"))

    def __call__(self, loss_fn: Callable[[], Tensor], shift: Callable[..., Tensor]) -> Tensor:
        """The mean of the ranks' losses where every weight w reads as shift(name, w)."""
        own = [(name, local(p.detach()), shard_of(p)) for name, p in self.params]
        before = [w.clone() for _, w, _ in own]
        try:
            for name, w, shard in own:
                w.copy_(shift(name, w, shard.first * shard.width if shard else 0))
            self._reshard()
            loss = loss_fn()
        finally:
            for (_, w, _), old in zip(own, before, strict=True):
                w.copy_(old)
            self._reshard()
        return self._mean(loss)

    def _reshard(self) -> None:
        """Let go of what is gathered."""
        for module in self.model.modules():
            if hasattr(module, "set_reshard_after_forward"):
                cast("Any", module).reshard()

    def _mean(self, loss: Tensor) -> Tensor:
        import torch.distributed as dist

        total = loss.detach().double()
        for dim in range(self.mesh.ndim):
            dist.all_reduce(total, group=self.mesh.get_group(dim))
        mean: Tensor = total / self.mesh.size()
        return mean.to(torch.promote_types(loss.dtype, torch.float32))
