"""Bases that do not look at the gradient.

An orthonormal one sees every direction equally often. It is held where it may come
after a basis that was found (GoLore), and drawn again in every step where all are random
(GrassJump). A Gaussian sketch is never held: it keeps norms on average (E P P' = I for
entries of variance 1 / r), and is what APOLLO reads its statistics from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.projectors.bases import Frame, orthonormal
from lowmem.optim.projectors.dense import Renewed, of_all_rows, power_iteration
from lowmem.optim.shards import Shape
from lowmem.optim.terms.changes import Change, Rotation, Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State


@of_all_rows
def random(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """A uniformly random orthonormal basis, named by parameter and step; see `dense.Find`."""
    ok = torch.ones((), dtype=torch.bool, device=basis.device)
    return orthonormal(hp.gaussian((basis.shape[0], basis.shape[1]), "basis")), ok


@dataclass(frozen=True)
class Switch:
    """Leading subspaces at first, random ones later (GoLore, arXiv 2410.11289); a `dense.Find`.

    Near a minimum the leading directions of a small batch's gradient are those of its noise, and a
    basis that looks for them may never see what is left of the gradient itself.

    Args:
        after: the first step whose refresh is random, at least 0; 0 for random bases throughout.

    Raises:
        UserError: a negative step.
    """

    after: int
    of_all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.after < 0:
            raise UserError(f"switch is a step, at least 0, got {self.after}")

    def __call__(self, frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
        """See `dense.Find`."""
        return (power_iteration if hp.step < self.after else random)(frame, basis, g, hp)


@dataclass(frozen=True)
class Drawn(Renewed):
    """A uniformly random orthonormal basis, anew every `update_proj_gap` steps (GrassJump, arXiv 2510.01878).

    Holds nothing: a step draws s r numbers and takes their QR factor. Workspace of a step
    beside R: 8 s r bytes. The basis is named by the step: a weight that has no gradient at
    the step of a refresh meets the new basis all the same, with moments of the old one.

    Args:
        frame: rank and side.
        update_proj_gap: steps with the same basis, at least 1.

    Example:
        >>> Drawn(Frame(4)).init(torch.zeros(16, 64))
        {}
    """

    changes: ClassVar[str] = "rotate"

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the basis."""
        return True

    def basis(self, hp: Hyper) -> Tensor:
        """The basis of this step, (s, r)."""
        return orthonormal(hp.gaussian(self.frame.size(hp.weight.shape), "basis", self.update_proj_gap))

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Nothing moves but the name; the basis before is drawn once more to tell how."""
        ok = torch.ones((), dtype=torch.bool, device=g.device)
        if not say or hp.first or hp.step == 0:
            return Unrelated(ok)
        before = self.basis(replace(hp, step=hp.step - self.update_proj_gap))
        return Rotation(ok, self.basis(hp).t() @ before, self.axis(g.shape))

    def opened(self, s: State, hp: Hyper) -> State:
        """The basis, drawn once for a step."""
        return {"basis": self.basis(hp)}


@dataclass(frozen=True)
class Gaussian(Renewed):
    """A sketch P of normal numbers with variance 1 / r, drawn anew every `update_proj_gap` steps.

    Holds nothing; draws s r numbers in every step (arXiv 2412.05270).

    Args:
        frame: rank and side.
        update_proj_gap: steps with the same sketch, at least 1.

    Example:
        >>> Gaussian(Frame(4)).init(torch.zeros(16, 64))
        {}
    """

    orthonormal: ClassVar[bool] = False

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the sketch."""
        return True

    def opened(self, s: State, hp: Hyper) -> State:
        """The sketch, drawn once for a step."""
        size = self.frame.size(hp.weight.shape)
        return {"basis": hp.gaussian(size, "sketch", self.update_proj_gap).mul_(size[1] ** -0.5)}
