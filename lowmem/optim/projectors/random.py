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
from lowmem.optim.changes import Change, Rotation, Unrelated
from lowmem.optim.contract import Projector
from lowmem.optim.hyper import Hyper
from lowmem.optim.projectors.dense import Frame, check_gap, orthonormal, power_iteration
from lowmem.optim.shards import Shape
from lowmem.optim.state import State


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

    def __post_init__(self) -> None:
        if self.after < 0:
            raise UserError(f"switch is a step, at least 0, got {self.after}")

    def __call__(self, frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
        """See `dense.Find`."""
        return (power_iteration if hp.step < self.after else random)(frame, basis, g, hp)


@dataclass(frozen=True)
class Drawn(Projector):
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

    frame: Frame
    update_proj_gap: int = 200
    changes: ClassVar[str] = "rotate"
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_gap(self.update_proj_gap)

    @property
    def period(self) -> int:
        """Steps with the same basis."""
        return self.update_proj_gap

    def axis(self, shape: tuple[int, int]) -> int:
        """See Frame."""
        return self.frame.axis(shape)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """See Frame."""
        return self.frame.low_shape(shape)

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the basis."""
        return True

    def complete(self, shape: tuple[int, int]) -> bool:
        """True where the rank reaches the side."""
        side, rank = self.frame.size(shape)
        return side == rank

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

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """See Frame."""
        return self.frame.down(s["basis"], g)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """See Frame."""
        return self.frame.up(s["basis"], low, i, j, hp.weight)

    def pair(self, s: State, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """See Frame."""
        return self.frame.pair(s["basis"], low, shape)


@dataclass(frozen=True)
class Gaussian(Projector):
    """A sketch P of normal numbers with variance 1 / r, drawn anew every `update_proj_gap` steps.

    Holds nothing; draws s r numbers in every step (arXiv 2412.05270).

    Args:
        frame: rank and side.
        update_proj_gap: steps with the same sketch, at least 1.

    Example:
        >>> Gaussian(Frame(4)).init(torch.zeros(16, 64))
        {}
    """

    frame: Frame
    update_proj_gap: int = 200
    dense: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_gap(self.update_proj_gap)

    @property
    def period(self) -> int:
        """Steps with the same sketch."""
        return self.update_proj_gap

    def axis(self, shape: tuple[int, int]) -> int:
        """See Frame."""
        return self.frame.axis(shape)

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """See Frame."""
        return self.frame.low_shape(shape)

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the sketch."""
        return True

    def _sketch(self, hp: Hyper) -> Tensor:
        size = self.frame.size(hp.weight.shape)
        return hp.gaussian(size, "sketch", self.update_proj_gap).mul_(size[1] ** -0.5)

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """P' G or G P."""
        return self.frame.down(self._sketch(hp), g)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """Rows of P R or R P'."""
        return self.frame.up(self._sketch(hp), low, i, j, hp.weight)
