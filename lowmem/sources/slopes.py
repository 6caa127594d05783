"""What an evaluation of the loss leaves, the gradient that is drawn from it, and what is asked of a loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.source import Named, Query
from lowmem.optim.terms.products import HALF
from lowmem.optim.terms.state import State
from lowmem.sources.directions import Perturbation
from lowmem.sources.structures import Structure

log = logging.getLogger(__name__)

NOISES = ("gaussian", "rademacher")


class Slope(NamedTuple):
    """What an evaluation leaves: the difference quotient along a direction, and the direction's name."""

    c: float
    direction: Perturbation


Evidence = tuple[Slope, ...]


class Estimate(Blocks):
    """The sum of c z over evaluations, drawn where it is looked at.

    Args:
        name: of the parameter; p: the parameter.
        slopes: what is summed.
    """

    def __init__(self, name: str, p: Tensor, slopes: Sequence[Slope]) -> None:
        super().__init__(matrix_shape(p.shape), None, p.device)
        self.pens = [z.pen(name, p.detach(), c) for c, z in slopes]
        self.finite = all(math.isfinite(slope.c) for slope in slopes)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat fp32 elements start..stop, new memory at each call."""
        if not self.finite:
            return torch.full((stop - start,), math.nan, device=self.device)
        total: Tensor | None = None
        for pen in self.pens:
            part = pen.gradient(start, stop)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j, drawn."""
        n = self.shape[1]
        return self.chunk(i * n, j * n).view(j - i, n)


def refuse_compiled(model: nn.Module | None) -> None:
    """Compiled code does not run hooks that were added later, and does not say so."""
    for name, module in model.named_modules() if model is not None else ():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                f"module {name!r} is compiled, and would not see the perturbed weights: "
                "pass the model uncompiled (torch_compile=False)"
            )


def one_number(loss: Any) -> Tensor:
    """A loss as it is.

    Raises:
        UserError: it is no tensor, or not one number.
    """
    if not isinstance(loss, Tensor):
        raise UserError(
            f"the loss of a batch is a tensor of one number, got {type(loss).__name__}: "
            "a score becomes one by torch.tensor(score)"
        )
    if loss.numel() != 1:
        raise UserError(f"the loss of a batch is one number, got shape {tuple(loss.shape)}: take its mean")
    return loss


def checked(loss: Any) -> Tensor:
    """A loss as a 0-D tensor; one that is too coarse is told.

    Raises:
        UserError: it is no tensor, or not one number.
    """
    found = one_number(loss)
    if found.dtype in HALF:
        log.warning(
            "the loss is %s, too coarse to tell two probes apart: compute it from logits.float()", found.dtype
        )
    return found.detach().reshape(())


def is_hollow(x: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as in a plan."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def values(losses: Tensor) -> list[float]:
    """As Python floats; 0 where tensors have no values, so that a probe can be planned."""
    if is_hollow(losses):
        return [0.0] * losses.numel()
    return [float(x) for x in losses.tolist()]


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Dropout off meanwhile; every module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()] if model is not None else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was


class Along:
    """A source whose evidence are slopes; `noise` and `structure` say which directions there are."""

    noise: str
    structure: Structure

    @property
    def quantized(self) -> bool:
        """Whether it is scales of quantized weights that the structure finds."""
        return self.structure.quantized

    @property
    def holds(self) -> bool:
        """Whether the structure holds something."""
        return self.structure.holds

    def init(self, x: Tensor) -> State:
        """What the structure holds."""
        return self.structure.init(x)

    def trained(self, model: nn.Module) -> Named:
        """Parameters that require gradients, or what the structure finds."""
        return self.structure.trained(model)

    def direction(self, query: Query, k: int) -> Perturbation:
        """The k-th direction of an evaluation."""
        return self.structure.direction(self.noise, query, k)

    def gradients(self, params: Named, evidence: Sequence[Evidence]) -> Iterator[tuple[nn.Parameter, Blocks]]:
        """The estimate for each trainable parameter, none of it held."""
        slopes = [slope for slopes in evidence for slope in slopes]
        for name, p in params:
            if slopes and p.requires_grad:
                yield p, Estimate(name, p, slopes)

    def settle_(self, params: Named, evidence: Sequence[Evidence]) -> None:
        """What the structure does with stepped tensors."""
        slopes = [slope for slopes in evidence for slope in slopes]
        for name, p in params:
            if slopes and p.requires_grad:
                self.structure.settle_(name, p, slopes)

    def gradient_bytes(self, shapes: Sequence[tuple[torch.Size, torch.dtype]], *, released: bool) -> int:
        """None."""
        return 0


def bounded(c: float, clip: float) -> float:
    """A slope within plus and minus the clip, where there is one; NaN where it is not finite."""
    if not math.isfinite(c):
        return math.nan
    return max(-clip, min(clip, c)) if clip else c
