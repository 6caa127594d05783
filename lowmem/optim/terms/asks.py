"""What a rule must be told beside the gradient of its tensor.

Some methods go by more: sums over all tensors of a model, the value of the loss, or the
curvature that a probe finds, a backward pass from labels that the model itself draws. A rule
declares what it asks for; the optimizer sees to it before the first tensor steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lowmem.errors import UserError

if TYPE_CHECKING:
    from lowmem.optim.blocks import Blocks
    from lowmem.optim.terms.hyper import Hyper
    from lowmem.optim.terms.state import State


class Asks:
    """A rule, by what it asks for; nothing.

    Attributes:
        joint: names of the 0-D fp64 numbers in its state that belong to all tensors. Each holds a copy, and
            the copies of the tensor whose first number is largest count: one that missed steps catches up.
        needs_loss: the value of the loss.
    """

    joint: ClassVar[tuple[str, ...]] = ()
    needs_loss: ClassVar[bool] = False

    @property
    def probes(self) -> int:
        """Steps between probes of the curvature; 0 for none."""
        return 0

    def whole(self, s: State, hp: Hyper) -> bool:
        """Whether this step asks for all of a gradient, not for its projection; may read the device."""
        return True

    def terms(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """What is summed over all tensors, of this one, (k,) fp64; pure."""
        raise NotImplementedError(f"{type(self).__name__} sums nothing")

    def sense_(self, g: Blocks, s: State, hp: Hyper, count: Tensor) -> None:
        """Take in what a probe found: the gradient of a mean over `count` drawn labels, (m, n)."""
        raise NotImplementedError(f"{type(self).__name__} senses nothing")

    def known(self, hp: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """The sums and the shared numbers of this step; whether this tensor takes it, 0-D bool.

        Raises:
            UserError: one tensor is stepped alone.
        """
        name = type(self).__name__
        if hp.overall is None or name not in hp.overall.sums:
            raise UserError(f"{name.lower()} sums over all tensors before one is stepped; call step()")
        ok = hp.overall.own[hp.name].isfinite().all()
        return hp.overall.sums[name], hp.overall.held[name], ok
