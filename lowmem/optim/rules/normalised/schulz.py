"""Newton and Schulz: X <- (a + b A + c A^2) X, A = X X', once for each (a, b, c).

In fp32 all steps go by the first A (`polynomial`): every X on the way is a polynomial T of it times the
first X, so the iteration runs on matrices of the short side alone, and X need not be held.

bf16 has eight bits. In A a small singular value stands as its square, and a T of five steps makes of it
rounding noise as large as the step: there X itself is held and rounded in every step (`rounded`), as in
published programs, but multiplied where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem.optim.blocks import PANEL, Blocks
from lowmem.optim.engine.cutting import walk


def polynomial(
    a: Tensor, norm: Tensor, steps: Sequence[tuple[float, float, float]], panel: int = PANEL
) -> tuple[Tensor, Tensor, Tensor]:
    """T of X <- (a + b A + c A^2) X, A = X X', once for each (a, b, c), from X over its norm.

    Args:
        a: X X', (s, s); used up. norm: 0-D, no smaller than the largest singular value.
        steps: at least one. panel: elements that are multiplied at a time.

    Returns:
        T; P, what the last step multiplied by, and A before it: P A P is the Gram matrix of T X.
    """
    a.div_(norm.square())
    t = torch.eye(a.shape[0], device=a.device).div_(norm)
    p = a
    for k, (first, second, third) in enumerate(steps):
        if k:  # powers of one matrix: they commute
            left_(p, a, panel)
            right_(a, p, panel)
            del p  # of the short side squared
        p = torch.addmm(a, a, a, beta=second, alpha=third) if third else a * second
        p.diagonal().add_(first)
        left_(p, t, panel)
    return t, p, a


def left_(p: Tensor, x: Tensor, panel: int) -> None:
    """x <- p x, some columns at a time."""
    width = max(1, panel // p.shape[0])
    for j in walk(range(0, x.shape[1], width), x.device):
        x[:, j : j + width] = p @ x[:, j : j + width]


def right_(x: Tensor, p: Tensor, panel: int) -> None:
    """x <- x p, some rows at a time."""
    height = max(1, panel // p.shape[0])
    for i in walk(range(0, x.shape[0], height), x.device):
        x[i : i + height] = x[i : i + height] @ p


def scratch(shape: tuple[int, int]) -> int:
    """Bytes of X in bf16, and of A, its square and what X is multiplied by."""
    m, n = shape
    return 2 * m * n + 6 * min(m, n) ** 2


def rounded(
    x: Blocks,
    steps: Sequence[tuple[float, float, float]],
    panel: int,
    tall: bool,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """X after the steps from X over its norm, by products of bf16; (m, n) bf16.

    Args:
        x: the matrix, its largest element about one.
        steps: (a, b, c) of each. panel: elements that are multiplied at a time.
        tall: whether the matrix, of which some rows may be elsewhere, has more rows than columns.
        total: what all rows add up to, from that of the rows here.
    """
    squares = torch.zeros((), device=x.device)
    for i, j in walk(x.ranges(), x.device):
        squares += x.rows(i, j).square().sum()
    norm = total(squares).sqrt() + 1e-7
    held = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    for i, j in walk(x.ranges(), x.device):  # rounded once, where dividing what is rounded would be twice
        held[i:j] = x.rows(i, j) / norm
    width = max(1, panel // held.shape[1 if tall else 0])
    for first, second, third in steps:
        a = total(held.t() @ held if tall else held @ held.t())
        p = torch.addmm(a, a, a, beta=second, alpha=third)
        for k in walk(range(0, held.shape[0 if tall else 1], width), x.device):
            strip = held[k : k + width] if tall else held[:, k : k + width]
            strip.copy_(torch.addmm(strip, *((strip, p) if tall else (p, strip)), beta=first))
    return held
