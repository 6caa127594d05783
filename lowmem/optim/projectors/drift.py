"""A basis that is replaced once gradients have drifted out of it (Lotus, arXiv 2602.01233).

    A = sum of G / |G| since the last look,  efficiency = |P'A| / |A|;  below `threshold`: find P anew

Unit gradients that go one way add up, noise cancels: the efficiency is the share of the way gone
that the basis sees. A has the weight's size. Both norms are those of A Omega instead, with a fixed
random Omega of a few columns that is drawn from the parameter's name: |P'A Omega|^2 and |A Omega|^2 are
|P'A|^2 and |A|^2 times the number of columns, on average; where there are as many columns as A
has, Omega is the identity, and the efficiency exact.

Whether the basis is replaced stands in the state, and nothing waits for the device to tell: a basis
is found every `update_proj_gap` steps, from a random start, and dropped where the old one serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.projectors.bases import Frame, energy, largest, own_rows
from lowmem.optim.projectors.dense import Find, Orthonormal, of_all_rows, power_iteration
from lowmem.optim.shards import whole
from lowmem.optim.terms.changes import Change
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.split import Split
from lowmem.optim.terms.state import State


@of_all_rows
def randomized(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """Two power iterations from a random start: what was missed so far is found too; see `dense.Find`."""
    return power_iteration(frame, basis, g, replace(hp, first=True))


@dataclass(frozen=True)
class Drift(Orthonormal):
    """The leading subspace, until gradients leave it.

    Holds 4 s (r + probes) bytes, s the side it spans. A step looks at the gradient twice more. Workspace
    beside R: R once more.

    Args:
        frame: rank and side.
        find: how a basis is found.
        update_proj_gap: steps between looks, at least 1; so long a basis stays at least.
        threshold: efficiency below which the basis is replaced, above 0, at most 1.
        probes: columns of Omega, at least 1.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> Drift(Frame(4), probes=8).init(torch.zeros(16, 64))["path"].shape
        torch.Size([16, 8])
    """

    find: Find = randomized
    threshold: float = 0.5
    probes: int = 16
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold <= 1.0:
            raise UserError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.probes < 1:
            raise UserError(f"probes must be at least 1, got {self.probes}")

    def _far(self, shape: tuple[int, int]) -> int:
        """The side that the basis does not span."""
        return whole(shape)[1 - self.axis(shape)]

    def _path(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(s, columns) of A Omega."""
        return self.frame.size(shape)[0], min(self.probes, self._far(shape))

    def init(self, x: Tensor) -> State:
        """The first r coordinate axes, and no way gone."""
        path = torch.zeros(self._path(matrix_shape(x.shape)), device=x.device)
        return {**super().init(x), "path": path}

    def renew(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Find a basis; take it where the old one does not serve."""
        path = s["path"]
        new, ok = self.find(self.frame, s["basis"], g, hp)
        if not (hp.first or hp.step == 0):
            seen, gone = (torch.linalg.vector_norm(x) for x in (s["basis"].t() @ path, path))
            left = seen < self.threshold * gone
            path.copy_(torch.where(ok, 0.0, path))
            ok = ok & left
        return self.store(s, new, ok, g.shape, say=say)

    def follow(self, s: State, split: Split) -> State:
        """The way gone with this gradient."""
        shape, hp = split.g.shape, split.hp
        columns, far = self._path(shape)[1], self._far(shape)
        if columns == far:
            omega = torch.eye(far, device=split.g.device)
        else:
            omega = hp.gaussian((columns, far), "path", 0)
        seen = self.frame.across(omega if self.axis(shape) == 0 else own_rows(omega.t(), shape), split.g)
        top, ok = largest(seen)
        length = energy(split.g, top, hp).sqrt()
        return {"path": torch.where(split.ok & ok, s["path"] + seen / top / length, s["path"])}
