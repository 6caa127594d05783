"""A basis that moves a little with every gradient (LDAdam, arXiv 2410.16103).

    B = rho P M^ + (1 - rho) A,   P <- orth(B B' P)

A is the gradient with what is owed to it, M^ the momentum that Adam holds in the basis, without
its bias. One power iteration a step, which starts from the basis before, follows the leading
subspace of their blend; moments follow the basis (on_refresh='rotate'). As P is orthonormal,
P'B = rho M^ + (1 - rho) P'A: B itself is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.projectors.bases import orthonormal, unit
from lowmem.optim.projectors.dense import Orthonormal
from lowmem.optim.shards import total
from lowmem.optim.terms.changes import Change
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class Blend(Orthonormal):
    """The leading subspace of momentum and gradient, by one power iteration a refresh.

    Holds 4 s r bytes, s the side it spans. Workspace of a refresh beside R: 12 s r bytes.

    Args:
        frame: rank and side.
        find: the first basis.
        update_proj_gap: steps between refreshes, at least 1; the paper has 1.
        rho: share of the momentum, in [0, 1); with 0 the rule needs none.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> from lowmem.optim.projectors.bases import Frame
        >>> Blend(Frame(4)).reads
        'exp_avg'
    """

    update_proj_gap: int = 1
    rho: float = 0.908

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.rho < 1.0:
            raise UserError(f"rho must be at least 0 and below 1, got {self.rho}")

    @property
    def reads(self) -> str:
        """The momentum, where it has a share."""
        return "exp_avg" if self.rho else ""

    def renew(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """One power iteration of the blend; the first basis is found in the gradient alone."""
        if hp.first or hp.step == 0:
            return super().renew(s, g, hp, inner, say=say)
        basis = s["basis"]
        low = self.frame.down(basis, g).mul_(1.0 - self.rho)
        share = self._share(inner, hp) if self.rho else None
        if share is not None:
            low.addcmul_(inner["exp_avg"].float(), share)
        top, ok = self.frame.largest(low, g)
        across = self.frame.across(low.div_(top), g).mul_(1.0 - self.rho)
        if share is not None:
            momentum = inner["exp_avg"].float()
            left = self.axis(g.shape) == 0
            small = momentum @ low.t() if left else total(g.shape, momentum.t() @ low)
            across.addmm_(basis, small * share)
        y, fine = unit(across, basis)
        return self.frame.replace_(basis, orthonormal(y), ok & fine, g.shape, say)

    def _share(self, inner: State, hp: Hyper) -> Tensor:
        """rho over the bias of the momentum, 0-D; a rule without age has none."""
        if "age" not in inner:
            return hp.vector(self.rho, dtype=torch.float32)[0]
        bias = 1.0 - hp.vector(hp.betas[0])[0] ** inner["age"]
        return (self.rho / bias.clamp(min=TINY)).float()
