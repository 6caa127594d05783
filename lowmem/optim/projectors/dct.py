"""Columns of one fixed orthonormal basis, chosen by what the gradient has of them (arXiv 2505.17967).

    C[k, j] = sqrt(2 / n) cos(k (2 j + 1) pi / (2 n)),  row 0 times sqrt(1 / 2)
    S = G C',  index = the r columns of S with the largest norms,  R = S[:, index]

The cosines of the DCT-II are near the directions of many gradients, and cost nothing to
find: a tensor holds r indices, and the basis of a side is held once for all tensors that
have such a side. Indices are sorted. A coordinate that stays chosen keeps its moments
(on_refresh='rotate'): the change is a permutation, exactly, and a coordinate that
comes in begins with age 0. Before a gradient has chosen, index - s is held, below zero: as in
`dense`, one of zeros chooses nothing, and a choice is tried again at steps 1, 2, 4, 8, ...
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import BLOCK, Blocks, Projected, matrix_shape
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.projectors.dense import Renewed, holds, looks_again
from lowmem.optim.shards import Shape, total
from lowmem.optim.terms.changes import Change, Permutation, Unrelated
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constant, Constants, State


def cosines(n: int, device: torch.device) -> Tensor:
    """C, (n, n) fp32: the DCT-II as a matrix.

    >>> c = cosines(8, torch.device("cpu"))
    >>> bool((c @ c.t()).allclose(torch.eye(8), atol=1e-6))
    True
    """
    c = torch.empty(n, n, device=device)
    odd = 2 * torch.arange(n, device=device) + 1
    height = max(1, BLOCK // n)
    for a in range(0, n, height):
        k = torch.arange(a, min(a + height, n), device=device)
        # integers modulo 4 n: an angle of a million radians has no digits left
        angle = (k[:, None] * odd % (4 * n)).double() * (math.pi / (2 * n))
        scale = torch.where(k == 0, 0.5, 1.0).double()[:, None].mul_(2.0 / n).sqrt_()
        c[a : a + height] = angle.cos_().mul_(scale)
    return c


@dataclass(frozen=True)
class DCT(Renewed):
    """The r cosines of which the gradient has most.

    Holds 4 r bytes, and 4 s^2 bytes once for each side s that tensors span.
    Workspace of a step beside R: the chosen cosines, 4 s r bytes.

    Args:
        frame: rank and side.
        update_proj_gap: steps between choices, at least 1.
        norm: which norm of a column counts, 1 or 2.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> from lowmem.optim.projectors.bases import Frame
        >>> DCT(Frame(4)).init(torch.zeros(16, 64))["index"]
        tensor([-16, -15, -14, -13], dtype=torch.int32)
    """

    norm: int = 1
    changes: ClassVar[str] = "permute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in (1, 2):
            raise UserError(f"norm is 1 or 2, got {self.norm}")

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the basis."""
        return True

    def init(self, x: Tensor) -> State:
        """The r slowest cosines, which nothing has chosen."""
        side, rank = self.frame.size(matrix_shape(x.shape))
        return {"index": torch.arange(-side, rank - side, dtype=torch.int32, device=x.device)}

    def constants(self, shape: tuple[int, int]) -> Constants:
        """The cosines of the side."""
        side = self.frame.size(shape)[0]
        return {"cosines": Constant(f"cosines{side}", functools.partial(cosines, side))}

    def due(self, hp: Hyper, s: State | None = None) -> bool:
        """By the period, and where nothing may be chosen yet."""
        return super().due(hp) or (looks_again(hp.step) and (s is None or holds(s["index"][0] < 0)))

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Choose anew, where the gradient can tell; between two refreshes, where nothing is chosen yet."""
        index, renews = s["index"], super().due(hp)
        chosen = index[0] >= 0
        if not renews and (isinstance(g, Projected) or (sizes(index.device).at_hand and holds(chosen))):
            return Unrelated(torch.zeros_like(chosen))
        norms = self._norms(s["cosines"], g, hp)
        top = norms.amax()
        ok = torch.isfinite(top) & (top > 0.0)
        if not renews:
            ok = ok & ~chosen
        old, rank = index.long().remainder(norms.shape[0]), index.shape[0]
        best = norms.nan_to_num(0.0).topk(rank, sorted=False).indices.sort().values
        new = torch.where(ok, best, old)
        place = torch.searchsorted(old, new).clamp_(max=rank - 1)
        before = torch.where(old[place] == new, place, -1)
        index.copy_(torch.where(ok, new, index))
        return Permutation(ok, before, self.axis(g.shape))

    def _norms(self, c: Tensor, g: Blocks, hp: Hyper) -> Tensor:
        """The norm of what the gradient has of each cosine, or its square over a constant; (s,)."""
        top = None if self.norm == 1 else hp.peak(g).clamp(min=TINY)
        if self.axis(g.shape) == 1:
            return total(g.shape, g.sum(lambda rows: _powers(rows @ c.t(), 0, top)))
        height = max(1, 4 * BLOCK // g.shape[1])
        panels = (c[a : a + height].t() for a in range(0, c.shape[0], height))
        return torch.cat([_powers(self.frame.down(panel, g), 1, top) for panel in panels])

    def opened(self, s: State, hp: Hyper) -> State:
        """The chosen cosines, gathered once for a step."""
        return {"basis": s["cosines"][s["index"]].t()}  # where it is below zero, from the end


def _powers(x: Tensor, dim: int, top: Tensor | None) -> Tensor:
    """Sums of magnitudes; of squares over the largest element, where that is given."""
    return x.abs().sum(dim) if top is None else (x / top).square_().sum(dim)
