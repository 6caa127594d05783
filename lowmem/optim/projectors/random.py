"""Bases that do not look at the gradient.

An orthonormal one sees every direction equally often (GoLore's part), and is held. A
Gaussian sketch is not held at all: it is drawn again from its name in every step,
keeps norms on average (E P P' = I for entries of variance 1 / r), and is what APOLLO
reads its statistics from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import Projector
from lowmem.optim.hyper import Hyper
from lowmem.optim.projectors.dense import Frame, check_gap, orthonormal
from lowmem.optim.state import State


def random(frame: Frame, basis: Tensor, g: Blocks, hp: Hyper) -> tuple[Tensor, Tensor]:
    """A uniformly random orthonormal basis, named by parameter and step; see `dense.Find`."""
    ok = torch.ones((), dtype=torch.bool, device=basis.device)
    return orthonormal(hp.gaussian((basis.shape[0], basis.shape[1]), "basis")), ok


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

    def _sketch(self, hp: Hyper) -> Tensor:
        size = self.frame.size(hp.weight.shape)
        return hp.gaussian(size, "sketch", self.update_proj_gap).mul_(size[1] ** -0.5)

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """P' G or G P."""
        return self.frame.down(self._sketch(hp), g)

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """Rows of P R or R P'."""
        return self.frame.up(self._sketch(hp), low, i, j, hp.weight)
