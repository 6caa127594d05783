"""A basis that moves after every step (Online Subspace Descent, arXiv 2408.12857).

    L(P) = |P P' A - A|^2 + lambda |P' P - I|^2,  A = G / |G|
    P <- P - rate lr D,  D = dL/dP, or what Adam makes of it

Instead of a factorization now and then, one step of gradient descent on what the
basis does not see of this gradient. The step is in closed form and costs two products:
with Y = A' P and Z = A Y,  dL/dP = 2 (P (P' Z) + Z (P' P)) - 4 Z + 4 lambda P (P' P - I).

The basis starts as that of a power iteration, and does not move before a gradient has
told one. It is not orthonormal, only near it. P'G is known from the step itself; the
basis moves once the weight is written, so that down and up of a step are of one basis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import Pointwise
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import energy
from lowmem.optim.projectors.dense import Framed, begin, found, looks_again, power_iteration
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.shards import Shape
from lowmem.optim.terms.changes import Change
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.split import Split
from lowmem.optim.terms.state import Constants, State, prefixed, scoped


@dataclass(frozen=True)
class Online(Framed):
    """A basis that follows the gradient by descent on what it misses.

    Holds 4 s r bytes and what its rule holds of them, s the side it spans. Workspace of a step beside
    R: R once more, and 8 s r bytes.

    Args:
        frame: rank and side.
        rate: of the descent, in units of the learning rate, above 0.
        penalty: lambda, of a basis that is not orthonormal, at least 0.
        rule: what a step is made of by; betas and eps are those of the weight.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> from lowmem.optim.projectors.bases import Frame
        >>> Online(Frame(4)).init(torch.zeros(16, 64))["basis"].shape
        torch.Size([16, 4])
    """

    rate: float = 5.0
    penalty: float = 0.1
    rule: Pointwise = field(default_factory=lambda: coded(SGD()))
    orthonormal: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rate > 0.0 or not self.penalty >= 0.0:
            raise UserError(f"rate must be above 0 and penalty at least 0, got {self.rate}, {self.penalty}")

    def shards(self, shape: Shape) -> bool:
        """Always: every rank has all of the basis."""
        return True

    def init(self, x: Tensor) -> State:
        """See Frame; and the rule's state of a basis."""
        held = self.frame.init(x)
        return {**held, **prefixed("rule", self.rule.init(torch.empty(held["basis"].shape, device=x.device)))}

    def constants(self, shape: tuple[int, int]) -> Constants:
        """Those of the rule."""
        return prefixed("rule", self.rule.constants(self.frame.size(shape)))

    def due(self, hp: Hyper, s: State | None = None) -> bool:
        """At the first step, and where a basis may be missing."""
        return hp.first or hp.step == 0 or looks_again(hp.step)

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """The leading subspace of the first gradient that tells one."""
        basis = s["basis"]
        if hp.first or hp.step == 0:
            new, ok = power_iteration(self.frame, basis, g, hp)
        else:
            new, ok = begin(power_iteration, self.frame, basis, g, hp)
        return self.frame.replace_(basis, new, ok, g.shape, say=False)

    def follow(self, s: State, split: Split) -> State:
        """One step of descent on L."""
        basis, g = s["basis"], split.g
        # in units of the largest number that R has, so that no square overflows
        top, ok = self.frame.largest(split.low, g)
        low = split.low.div_(top)  # the weight is written: nobody looks at R again
        pulled = self.frame.across(low, g).div_(top)  # G Y, as (s, r)
        norm = energy(g, top, split.hp)
        pulled = torch.where(ok & (norm > 0.0), pulled / norm, 0.0)
        overlap = basis.t() @ basis
        slope = basis @ (basis.t() @ pulled) + pulled @ overlap - 2.0 * pulled
        slope = (2.0 * slope + 4.0 * self.penalty * (basis @ overlap - basis)).contiguous()
        ok = split.ok & ok & found(basis)
        fine = split.hp.advance(self.rule, slope, scoped(s, "rule"), split.hp, ok)
        return {"basis": torch.where(fine, basis - self.rate * split.hp.lr * slope, basis)}
