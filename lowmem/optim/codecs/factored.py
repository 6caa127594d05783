"""A second moment held by less than one number for each element.

Block-wise codecs hold a moment that was computed in full. A factored moment
never exists in full: the average moves in its compressed form, and what divides
the gradient is the reconstruction. It takes sums over the whole matrix, so it
belongs to rules that see one (`Rule`), not to pointwise ones.

    RowCol       means over rows and over columns (Adafactor): m + n numbers

A factored moment is asked for three things: what it holds of one gradient
(`reduce`, one pass over row blocks), to move its average there (`average_`,
which is linear, so it commutes with the compression), and two vectors whose outer
product is 1 / sqrt(V) (`roots`), so that V is never decoded into a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.shards import whole
from lowmem.optim.terms.fp32 import LARGEST_MEAN, TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State


class Factored(Protocol):
    """A non-negative (m, n) matrix held in compressed form."""

    def init(self, x: Tensor) -> State:
        """What is held for a weight like x: of the zero matrix."""

    def reduce(self, g: Blocks, eps: float, hp: Hyper) -> State:
        """What is held of G^2 + eps."""

    def sound(self, new: State, hp: Hyper) -> Tensor:
        """0-D bool: what `reduce` gave is finite, and so is every element that it has seen."""

    def average_(self, s: State, new: State, rate: Tensor, ok: Tensor) -> None:
        """Move s towards new by the rate, where ok."""

    def roots(self, s: State, hp: Hyper) -> tuple[Tensor, Tensor]:
        """p (m,) and q (n,) with 1 / sqrt(V) = p q'; both fresh."""


@dataclass(frozen=True)
class RowCol:
    """The rank-one matrix with the row and column means of V (arXiv 1804.04235).

    V = r c' / mean(r), r and c the means of G^2 over columns and over rows.

    Bytes for an (m, n) weight: 4 (m + n). No sum is formed that could overflow where
    the mean does not.

    Args:
        floor: rows and columns below this share of the mean of V count as this share. In a
            subspace, a direction that the gradient does not have holds the rounding noise
            of the projection, and dividing by its own size would make a full step of it.
    """

    floor: float = 0.0

    def init(self, x: Tensor) -> State:
        """Two vectors of zeros."""
        m, n = matrix_shape(x.shape)
        return {"row": torch.zeros(m, device=x.device), "col": torch.zeros(n, device=x.device)}

    def reduce(self, g: Blocks, eps: float, hp: Hyper) -> State:
        """Both means of G^2 in one pass; columns are averaged over all shards of rows."""
        m, n = g.shape
        row, col = torch.full((m,), eps, device=g.device), torch.full((n,), eps * hp.share, device=g.device)
        hp.sweep(_add_means_, g, (row,), (col,), whole(g.shape))
        return {"row": row, "col": hp.total(col)}

    def sound(self, new: State, hp: Hyper) -> Tensor:
        """Every element reaches a mean of its row: their mean tells of NaN, Inf and squares beyond fp32."""
        return hp.total(self._mean(new, hp)) <= LARGEST_MEAN

    def average_(self, s: State, new: State, rate: Tensor, ok: Tensor) -> None:
        """The mean of an average is the average of the means."""
        for key, value in new.items():
            s[key].lerp_(torch.where(ok, value, s[key]), rate)

    def roots(self, s: State, hp: Hyper) -> tuple[Tensor, Tensor]:
        """1 / sqrt(r / mean(r)) and 1 / sqrt(c)."""
        mean = hp.total(self._mean(s, hp))
        # a row without gradient may lie 1e38 below the mean: its root stays finite
        row = (s["row"] / mean.clamp(min=TINY)).clamp_(min=max(self.floor, TINY))
        col = torch.maximum(s["col"], self.floor * mean) if self.floor else s["col"]
        return row.rsqrt_(), col.clamp(min=TINY).rsqrt_()

    @staticmethod
    def _mean(s: State, hp: Hyper) -> Tensor:
        count = s["row"].numel() if hp.shard is None else hp.shard.full[0]
        return torch.dot(s["row"], s["row"].new_full(s["row"].shape, 1.0 / count))


def _add_means_(rows: Tensor, row: Tensor, col: Tensor, m: int, n: int) -> None:
    """Of its own so that the squares of one block are gone before those of the next are made."""
    longest = max(m, n)  # squares over it have finite sums along both sides
    rows = rows.contiguous()  # a transposed gradient must give the same bits
    square = torch.addcmul(row.new_zeros(()), rows, rows, value=1.0 / longest)
    # a sum uses all threads where a product with a vector uses one
    row.add_(square.sum(1), alpha=longest / n)
    col.add_(square.sum(0), alpha=longest / m)
