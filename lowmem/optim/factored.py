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
from lowmem.optim.cutting import walk
from lowmem.optim.rule import Hyper, State

TINY = torch.finfo(torch.float32).tiny


class Factored(Protocol):
    """A non-negative (m, n) matrix held in compressed form."""

    def init(self, x: Tensor) -> State:
        """What is held for a weight like x: of the zero matrix."""

    def reduce(self, g: Blocks, share: Tensor, hp: Hyper) -> State:
        """What is held of G^2; `share` is the part of the whole tensor that g is."""

    def average_(self, s: State, new: State, rate: Tensor, ok: Tensor) -> None:
        """Move s towards new by the rate, where ok."""

    def roots(self, s: State, share: Tensor, hp: Hyper) -> tuple[Tensor, Tensor]:
        """p (m,) and q (n,) with 1 / sqrt(V) = p q'."""


@dataclass(frozen=True)
class RowCol:
    """The rank-one matrix with the row and column means of V (arXiv 1804.04235).

    V = r c' / mean(r), r and c the means of G^2 over columns and over rows.

    Bytes for an (m, n) weight: 4 (m + n). A product with a vector of 1 / n takes
    the means: no sum is formed that could overflow where the mean does not.

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

    def reduce(self, g: Blocks, share: Tensor, hp: Hyper) -> State:
        """Both means of G^2 in one pass; columns are averaged over all shards of rows."""
        m, n = g.shape
        row, col = torch.zeros(m, device=g.device), torch.zeros(n, device=g.device)
        along, down = torch.full_like(col, 1.0 / n), torch.full_like(row, 1.0 / m)
        for i, j in walk(g.ranges(), row):
            # contiguous: a transposed gradient must give the same bits
            square = g.rows(i, j).contiguous().square()
            row[i:j] = square @ along
            col.addmv_(square.t(), down[i:j])
        return {"row": row, "col": hp.total(col * share)}

    def average_(self, s: State, new: State, rate: Tensor, ok: Tensor) -> None:
        """The mean of an average is the average of the means."""
        for key, value in new.items():
            s[key].copy_(torch.where(ok, s[key] + rate * (value - s[key]), s[key]))

    def roots(self, s: State, share: Tensor, hp: Hyper) -> tuple[Tensor, Tensor]:
        """1 / sqrt(r / mean(r)) and 1 / sqrt(c)."""
        mean = hp.total(s["row"].double().mean() * share)
        # a row without gradient may lie 1e38 below the mean: its root stays finite
        row = (s["row"] / mean.clamp(min=TINY)).clamp(min=max(self.floor, TINY))
        col = torch.maximum(s["col"], (self.floor * mean).float())
        return row.rsqrt(), col.clamp(min=TINY).rsqrt()
