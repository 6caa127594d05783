"""A second moment in 4 bits whose scale follows rows and columns (arXiv 2309.01507).

Squares of gradients are large along whole rows or columns: a token that occurs, a channel
that is loud. A block of 128 neighbours has one scale for what lies on both sides of such a
line; the smaller of a row's and a column's largest element lies closer to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.blocks import BLOCK, Blocks, matrix_shape
from lowmem.optim.engine.cutting import walk
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State


def maxima(x: Blocks, hp: Hyper) -> State:
    """The largest element of each row, and of each column over all shards of rows; x is not negative."""
    m, n = x.shape
    row, col = torch.zeros(m, device=x.device), torch.zeros(n, device=x.device)
    for i, j in walk(x.ranges(), x.device):
        rows = x.rows(i, j)
        row[i:j] = rows.amax(1)
        col = torch.maximum(col, rows.amax(0)) if i < j else col
    return {"row": row, "col": hp.total(col, "max")}


def least(s: State, i: int, j: int) -> Tensor:
    """Rows i..j of min(row, col): no element of what `maxima` saw is larger; fresh."""
    return torch.minimum(s["row"][i:j, None], s["col"])


@dataclass(frozen=True)
class RankOne:
    """A non-negative (m, n) matrix in 4 bits: (code + 1) / 16 of min(row maximum, column maximum).

    Bytes: ceil(m n / 2) + 4 (m + n). The first of two codes is in the upper half of a byte. There is no code
    for zero: nothing that was not zero decodes to zero, and a zero beside larger elements to a sixteenth.

    Example:
        >>> {key: tuple(x.shape) for key, x in RankOne().init(torch.zeros(3, 5)).items()}
        {'codes': (8,), 'row': (3,), 'col': (5,)}
    """

    def init(self, x: Tensor) -> State:
        """The zero matrix."""
        m, n = matrix_shape(x.shape)
        return {
            "codes": torch.zeros(-(-m * n // 2), dtype=torch.uint8, device=x.device),
            "row": torch.zeros(m, device=x.device),
            "col": torch.zeros(n, device=x.device),
        }

    def rows(self, s: State, i: int, j: int) -> Tensor:
        """Rows i..j, decoded; fresh."""
        n = s["col"].numel()
        first = i * n // 2
        held = s["codes"][first : -(-j * n // 2)]
        codes = torch.stack((held >> 4, held & 15), dim=-1).view(-1)[i * n - 2 * first :][: (j - i) * n]
        return codes.view(j - i, n).float().add_(1.0).mul_(1.0 / 16.0).mul_(least(s, i, j))

    def store_(self, s: State, value: Blocks, new: State, ok: Tensor) -> None:
        """Hold another matrix, where ok.

        Args:
            s: what is held; value: may be made of it, row by row.
            new: the `maxima` of value; ok: 0-D bool.
        """
        for i, j in walk(list(_even(value.shape)), value.device):
            scale = least(new, i, j).clamp_(min=TINY)
            share = value.rows(i, j) / scale
            codes = share.mul_(16.0).add_(0.5).floor_().sub_(1.0).clamp_(0.0, 15.0).to(torch.uint8).view(-1)
            if codes.numel() % 2:
                codes = torch.cat((codes, codes.new_zeros(1)))
            upper, lower = codes.view(-1, 2).unbind(-1)
            start = i * value.shape[1] // 2
            held = s["codes"][start : start + upper.numel()]
            held.copy_(torch.where(ok, upper * 16 + lower, held))
        for key, maximum in new.items():
            s[key].copy_(torch.where(ok, maximum, s[key]))


def _even(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Row ranges that begin with a whole byte of codes."""
    m, n = shape
    height = max(2, BLOCK // n // 2 * 2)
    for i in range(0, m, height):
        yield i, min(m, i + height)
