"""A Trainer over a model whose scales are what is trained: it is let in, and its checkpoints come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lowmem.errors import CheckpointError, UserError
from lowmem.optim.source import Named
from lowmem.sources.quantized import unsaved
from lowmem.training.arguments import LowMemFields


@contextmanager
def admitted(*given: Any, **named: Any) -> Iterator[None]:
    """Take the scales, and let the Trainer take the model: it refuses 4-bit weights without adapters.

    Args:
        *given, **named: what the Trainer is made with.
    """
    model, args = (named.get(key, given[i] if len(given) > i else None) for i, key in enumerate(TAKEN))
    source = args.strategy().source if isinstance(args, LowMemFields) else None
    if source is None or not source.quantized or not isinstance(model, nn.Module):
        yield
        return
    if problem := unsaved(model):
        raise UserError(problem)
    source.trained(model)  # before anything runs in eval mode, which may repack codes
    model.requires_grad_(False)
    taken: Any = model
    was, taken.is_quantized = getattr(model, "is_quantized", False), False
    try:
        yield
    finally:
        taken.is_quantized = was


TAKEN = ("model", "args")


def load_scales(named: Named, folder: Path) -> None:
    """Copy scales out of a checkpoint's files; the Trainer loads codes alone.

    Raises:
        CheckpointError: a scale is in none of them.
    """
    from safetensors import safe_open

    left = dict(named)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as held:
            for name in left.keys() & set(held.keys()):
                left.pop(name).detach().copy_(held.get_tensor(name))
    if left:
        raise CheckpointError(f"{folder.name} has no {next(iter(left))}: it is of another model")
