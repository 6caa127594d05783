"""A stack of matrices (E, m, n), such as the experts of a mixture, stepped matrix by matrix.

A rule that needs the matrix (a subspace, a factored moment) would see a stack as one long
row for each expert. Here each expert is a matrix of its own, with its own basis, means and
random streams; what is held lies in one tensor for each key, expert after expert along a
new first dimension. Rules that treat elements alone, and measure nothing over a tensor,
step the stack as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense, matrix_shape
from lowmem.optim.contract import AnyRule
from lowmem.optim.terms.state import State


def like(x: Tensor) -> Tensor:
    """One matrix of a stack: shape, dtype and device count."""
    return x[0] if len(x) else x.new_empty(x.shape[1:])


def init(rule: AnyRule, x: Tensor) -> State:
    """Fresh state of a stack: that of one matrix, as often as there are matrices."""
    return {key: repeated(value, len(x)) for key, value in rule.init(like(x)).items()}


def repeated(value: Tensor, count: int) -> Tensor:
    """Copies along a new first dimension, each with the strides of the one."""
    shape, strides = (count, *value.shape), (value.numel(), *value.stride())
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def state(held: Mapping[str, Tensor], i: int) -> State:
    """Views of one matrix's state."""
    return {key: value[i] for key, value in held.items()}


def flat(held: Mapping[str, Tensor], i: int, count: int) -> State:
    """Views of one matrix's part of what is held element by element."""
    return {key: value.view(count, -1)[i] for key, value in held.items()}


def gradient(g: Blocks, shape: tuple[int, ...], i: int) -> Blocks:
    """One matrix of a stack's gradient, (m, n).

    Args:
        g: of the stack, seen as (E, m n).
        shape: (E, m, n); i: which matrix.
    """
    if isinstance(g, Dense):
        return Dense(g.tensor[i], g.factor)
    m, n = matrix_shape(shape[1:])

    def rows(first: int, last: int) -> Tensor:
        return g.chunk((i * m + first) * n, (i * m + last) * n).view(last - first, n)

    return Blocks((m, n), rows, g.device, g.dtype)
