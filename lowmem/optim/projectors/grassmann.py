"""Bases that move on the Grassmannian: along a geodesic, so that they stay orthonormal.

    T = U diag(sigma) V',  P'T = 0   (a tangent)
    P <- P V cos(a sigma) V' + U sin(a sigma) V' + P (I - V V')

A tangent turns the subspace by the angles a sigma. SubTrack's is the descent direction of
what the basis misses of this gradient, and its leading pair (u, v) alone is followed;
GrassWalk's is random. Both are `dense.Find`s: the first basis is that of a power
iteration, and the axes before it stay until there is one. Angles are of G / |G| and
in radians: a rate means the same for every weight.

Everything is done with the basis as (s, r), on whichever side of G it stands. The code
released with SubTrack multiplies the tangent of a basis on the right by I - P'P = 0, so
that most of its bases never move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.projectors.bases import Frame, energy, largest, orthonormal
from lowmem.optim.projectors.dense import found, power_iteration
from lowmem.optim.terms.hyper import Hyper


def tangent(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """T = 2 (A - P P'A) (P'A)', A = G / |G|, singular values at most 1; and whether G has one."""
    low = frame.down(basis, g)
    # in units of the largest number that P'G has, so that no square overflows
    top, ok = frame.largest(low, g)
    pulled = frame.across(low.div_(top), g).div_(top)
    # P'G A' is exactly P' times this: the tangent has no part in the basis
    pulled = pulled.addmm_(basis, basis.t() @ pulled, alpha=-1.0)
    fine = largest(pulled)[1] & ok
    return torch.where(fine, pulled.mul_(2.0 / energy(g, top, hp)), 0.0), fine


@dataclass(frozen=True)
class Track:
    """One step of descent along the leading pair of the tangent (SubTrack++, arXiv 2502.01586).

        (sigma, u, v) of T,  P <- P + (P v (cos(rate sigma) - 1) + u sin(rate sigma)) v'

    Args:
        rate: radians for a tangent of length 1, above 0; sigma is at most 1.

    Raises:
        UserError: a rate that is not above 0.

    Example:
        >>> from lowmem.optim.projectors.dense import Orthonormal
        >>> Orthonormal(Frame(4), Track()).low_shape((16, 64))
        (4, 64)
    """

    rate: float = 1.0
    of_all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rate > 0.0:
            raise UserError(f"rate must be above 0, got {self.rate}")

    def __call__(self, frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
        """See `dense.Find`."""
        if hp.first or hp.step == 0:
            return power_iteration(frame, basis, g, hp)
        t, ok = tangent(frame, basis, g, hp)
        v = torch.linalg.eigh((t.t() @ t).double()).eigenvectors[:, -1:].float()
        u = t @ v
        sigma = torch.linalg.vector_norm(u)
        u = u / torch.where(sigma > 0.0, sigma, 1.0)
        angle = self.rate * sigma
        turned = basis @ v * (angle.cos() - 1.0) + u * angle.sin()
        return orthonormal(torch.addmm(basis, turned, v.t())), ok & found(basis)


@dataclass(frozen=True)
class Walk:
    """A step along a random geodesic (GrassWalk, arXiv 2510.01878).

        X ~ N(0, 1),  T = X - P P'X = U diag(sigma) V',  angles = angle sigma / sigma_1

    Args:
        angle: the largest angle of a step in radians, above 0 and at most pi / 2.

    Raises:
        UserError: an angle outside its range.

    Example:
        >>> from lowmem.optim.projectors.dense import Orthonormal
        >>> Orthonormal(Frame(4), Walk()).init(torch.zeros(16, 64))["basis"].shape
        torch.Size([16, 4])
    """

    angle: float = 0.5
    of_all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.angle <= math.pi / 2:
            raise UserError(f"angle must be above 0 and at most pi / 2, got {self.angle}")

    def __call__(self, frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
        """See `dense.Find`."""
        if hp.first or hp.step == 0:
            return power_iteration(frame, basis, g, hp)
        side, rank = basis.shape
        ok = found(basis)
        if side == rank:  # there is nowhere to go: what is left of X is rounding noise
            return basis, ok
        x = hp.gaussian((side, rank), "walk")
        x.addmm_(basis, basis.t() @ x, alpha=-1.0)
        u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
        del x  # as large as the basis
        angles = sigma * (self.angle / sigma[0])
        return orthonormal(torch.addmm(basis @ (vh.t() * angles.cos() @ vh), u.mul_(angles.sin()), vh)), ok
