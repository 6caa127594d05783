"""The weights that a method evaluates, where they are not those that it trains.

Schedule-free training takes gradients beside the average that its paper evaluates; lookahead
has slow weights, weight prediction is ahead of its own. What lies between is held as a moment
(`AnyRule.beside`), so that both are at hand. A checkpoint belongs to the weights of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lowmem.optim.blocks import BLOCK, Blocks, matrix_shape
from lowmem.optim.engine.cutting import read_flat, write_flat
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.optimizer import LowMemOptimizer

_INSIDE: weakref.WeakSet[LowMemOptimizer] = weakref.WeakSet()


@contextmanager
def evaluated(optimizer: LowMemOptimizer) -> Iterator[None]:
    """The weights that the method evaluates; afterwards those of training, to the last bit.

        W + lr B,  B as the rule says, lr that of the group now

    Save a model for use inside, a checkpoint outside; no step is taken inside. Inside another one of the same
    optimizer it changes nothing more. Holds a copy of each weight that differs: nothing where the method
    evaluates what it trains, as most do.

    Args:
        optimizer: whose weights.

    Example:
        >>> import lowmem
        >>> weight = torch.nn.Parameter(torch.ones(4, 4))
        >>> optimizer = lowmem.optimizer([weight], "adamw", modifiers="lookahead", lr=0.1)
        >>> weight.grad = torch.ones(4, 4)
        >>> optimizer.step()
        >>> with evaluated(optimizer):
        ...     print(weight[0, 0].item())
        1.0
        >>> round(weight[0, 0].item(), 6)
        0.9
    """
    if optimizer in _INSIDE:
        yield
        return
    kept: list[tuple[Tensor, Tensor]] = []
    _INSIDE.add(optimizer)
    try:
        with torch.no_grad():
            for w, beside, lr in displacements(optimizer):
                kept.append((w, w.clone()))
                _displace_(w, beside, lr)
        yield
    finally:
        _INSIDE.discard(optimizer)
        with torch.no_grad():
            for w, before in kept:
                w.copy_(before)


@torch.no_grad()
def is_beside(optimizer: LowMemOptimizer) -> bool:
    """Whether the method now evaluates other weights than those it trains."""
    return next(displacements(optimizer), None) is not None


def displacements(optimizer: LowMemOptimizer) -> Iterator[tuple[Tensor, Blocks, float]]:
    """Each weight that is evaluated elsewhere, with B and lr."""
    for p, whole in ((p, p.detach()) for _, p in optimizer.named_parameters() if optimizer.state.get(p)):
        for part in optimizer.ready(p)[0].parts:
            w, hp = part.of(whole), optimizer.hyper(p, part)
            hp = replace(hp, step=max(0, hp.step - 1))  # that of the basis which is held
            beside = part.rule.beside(part.state, matrix_shape(w.shape), hp)
            if beside is not None:
                yield w, beside, hp.lr


def _displace_(w: Tensor, beside: Blocks, lr: float) -> None:
    """w <- w + lr B, block by block."""
    for start in range(0, w.numel(), BLOCK):
        if isinstance(w, Int8Weight):
            stop = min(start + BLOCK, w.numel())
            w.encode_(start, torch.add(w.flat(start, stop), beside.chunk(start, stop), alpha=lr))
            continue
        old = read_flat(w, start, min(BLOCK, w.numel() - start))
        new = torch.add(
            old.to(torch.promote_types(w.dtype, torch.float32)),
            beside.chunk(start, start + len(old)),
            alpha=lr,
        )
        write_flat(w, start, new.to(w.dtype))
