"""The loss at a displaced point where the rows of weights are spread over ranks.

FSDP2 gathers a module's weights from the rows that ranks hold, after any hook of ours. So the
rows are displaced themselves, and put back from a copy, bit for bit: a probe holds this
rank's rows twice. What is gathered already is let go before and after, or a forward pass
would see the point before. Ranks see batches of their own, and
exchange one number for a probe, as replicas do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.shards import local, shard_of
from lowmem.optim.source import Named


def is_spread(params: Named) -> bool:
    """Whether rows of parameters lie on several ranks."""
    return any(hasattr(p, "device_mesh") for _, p in params)


def unspread(on_rows: bool, at_once: int) -> str:
    """What has no meaning on rows, all of it, with the remedy; empty where all has.

    Args:
        on_rows: whether elements of a direction follow from their index; at_once: points of a forward pass.
    """
    problems = []
    if not on_rows:
        problems.append("these directions look at whole weights: take mezo or fzoo for sharded parameters")
    if at_once > 1:
        problems.append(f"at_once={at_once}: sharded parameters are displaced where they lie; take at_once=1")
    return "; ".join(problems)


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

    def __call__(self, loss_fn: Callable[[], Tensor], shift: Callable[..., Tensor]) -> Tensor:
        """The loss where every weight w reads as shift(name, w)."""
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
        return loss

    def _reshard(self) -> None:
        """Let go of what is gathered."""
        for module in self.model.modules():
            if hasattr(module, "set_reshard_after_forward"):
                cast("Any", module).reshard()
