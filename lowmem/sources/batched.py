"""The loss at several points in one forward pass.

Every operation of the model is run for all points together (torch.func.vmap):
small batches fill a device, and a weight's owner is called once. The inputs are
the same for all; activations and the displaced copies of a module are there once
for each point.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import UserError, first_line
from lowmem.sources.probe import Prober, Shift
from lowmem.sources.slopes import one_number


def evaluate_at_once(prober: Prober, loss_fn: Callable[[], Tensor], shifts: Sequence[Shift]) -> list[Tensor]:
    """The loss where every weight w reads as shift(name, w), for each shift.

    Args:
        prober: of parameters whose reads are known; loss_fn: evaluated once; shifts: the points.

    Raises:
        UserError: a weight is read outside the module that owns it, or vmap cannot run the model.
    """
    if prober.held:
        raise UserError(
            f"at_once: {sorted(prober.held)[0]!r} is read outside the module that owns it, where several "
            "points cannot be told apart; leave at_once out"
        )

    def one(i: Tensor) -> Tensor:
        with _batched(prober, shifts, i):
            loss = one_number(loss_fn())
        return loss.detach().reshape(())

    try:
        with warnings.catch_warnings():  # attention on a CPU runs point by point, which is what we would do
            warnings.filterwarnings("ignore", message="There is a performance drop")
            points = torch.arange(len(shifts), device=prober.params[0][1].device)
            return list(torch.func.vmap(one)(points))
    except UserError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"at_once: torch.func.vmap cannot run this model ({first_line(error)[:160]}); leave at_once out"
        ) from error


@contextmanager
def _batched(prober: Prober, shifts: Sequence[Shift], i: Tensor) -> Iterator[None]:
    """Owners see the i-th displaced copy of their weights, i standing for all points at a time."""
    originals: dict[tuple[int, str], tuple[nn.Module, nn.Parameter]] = {}
    depth: Counter[int] = Counter()

    def enter(module: nn.Module, args: Any) -> None:
        depth[id(module)] += 1
        for own, p in list(module._parameters.items()):
            if p is not None and id(p) in prober.names:
                name, w = prober.names[id(p)], p.detach()
                copies = torch.stack([shift(name, w) for shift in shifts])
                originals[id(module), own] = (module, p)
                module._parameters[own] = copies.index_select(0, i.view(1)).squeeze(0)  # type: ignore[assignment]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        depth[id(module)] -= 1
        for own in list(module._parameters) if not depth[id(module)] else ():
            if (id(module), own) in originals:
                module._parameters[own] = originals.pop((id(module), own))[1]

    with prober.hooked(enter, leave):
        try:
            yield
        finally:
            for (_, own), (module, p) in originals.items():
                module._parameters[own] = p
