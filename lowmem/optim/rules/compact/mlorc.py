"""Adam with both moments held as products of two thin matrices (MLorc, arXiv 2506.01897).

    M = beta1 M~ + (1 - beta1) G,  V = beta2 V~ + (1 - beta2) G^2,  W <- decay W - lr M^ / (sqrt(V^) + eps)
    held:  M ~ P R,  V ~ P R,  P orthonormal (s, r) on the short side,  R = P'M (r, l)

The momentum is compressed, not the gradient: a step has full rank and sees all of G. V~ has
negative entries, which the mean of their magnitudes replaces.

A moment of rank r is found by power iterations that start from what is held, and a little noise, so that
a direction that is not held yet can be found: P <- orth(M R'), R <- P'M. Moments are made anew
wherever they are looked at, block by block, so that no matrix of the weight's size exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction, matrix_shape
from lowmem.optim.contract import Rule
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.engine.cutting import walk
from lowmem.optim.projectors.bases import Frame, orthonormal, own_rows, unit
from lowmem.optim.shards import Shape, whole
from lowmem.optim.terms.fp32 import LARGEST_MEAN, LEAST_EPS
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State, scoped

MOMENTS = ("exp_avg", "exp_avg_sq")
STIR = 1e-3
"""Noise in a start, as a share of the largest number that is held."""


@dataclass(frozen=True)
class MLorc(Rule):
    """Adam from moments of low rank (see the module's docstring).

    Bytes for an (m, n) weight: 8 r (m + n) + 4. Vectors have moments of rank one: Adam's.

    Args:
        frame: rank of a moment, and the side of P.
        iterations: of power iteration at a step, at least 1; the first step takes one more.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> {key: tuple(x.shape) for key, x in MLorc(Frame(2)).init(torch.zeros(3, 5)).items() if "sq" in key}
        {'exp_avg_sq.basis': (3, 2), 'exp_avg_sq.low': (2, 5)}
    """

    frame: Frame = field(default_factory=lambda: Frame(4))
    iterations: int = 1
    reads_later: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"iterations must be at least 1, got {self.iterations}")

    def init(self, x: Tensor) -> State:
        """Both moments zero, age 0."""
        shape = matrix_shape(x.shape)
        thin = {"basis": self.frame.size(shape), "low": self.frame.low_shape(shape)}
        zeros = {
            f"{m}.{key}": torch.zeros(size, device=x.device) for m in MOMENTS for key, size in thin.items()
        }
        return {**zeros, "age": torch.zeros((), dtype=torch.int32, device=x.device)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2, eps, and what the bias corrections multiply by."""
        beta1, beta2 = hp.betas
        corrections = 1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5
        return 1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS), *corrections

    def shards(self, shape: Shape) -> bool:
        """Always: what both factors are found by is of all rows."""
        return True

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """The step is made from what is held, while it is written; then what will be held is found."""
        ok = self._sound(g, hp)
        s["age"].add_(ok)
        rate1, rate2, eps, correction1, correction2 = numbers_of(self, s["age"], hp).unbind()
        first, second = scoped(s, "exp_avg"), scoped(s, "exp_avg_sq")
        plain = Blocks(g.shape, None, g.device)  # products of moments are fp32
        instead = self._mean_below(second, plain, hp)

        def average(i: int, j: int) -> Tensor:
            return self._rows(first, i, j, plain).lerp_(g.rows(i, j), rate1)

        def squares(i: int, j: int) -> Tensor:
            old = self._rows(second, i, j, plain)
            return torch.where(old < 0.0, instead, old).lerp_(g.rows(i, j).square(), rate2)

        def step(i: int, j: int) -> Tensor:
            return average(i, j).mul_(correction1).div_(squares(i, j).sqrt_().mul_(correction2).add_(eps))

        def commit() -> None:
            for held, look, name in ((first, average, MOMENTS[0]), (second, squares, MOMENTS[1])):
                self._store(Blocks(g.shape, look, g.device), held, ok, name, hp)

        return Direction(Blocks(g.shape, step, g.device), ok=ok, commit=commit)

    @staticmethod
    def _sound(g: Blocks, hp: Hyper) -> Tensor:
        """No sum of squares can be infinite."""
        return hp.peak(g) <= math.sqrt(LARGEST_MEAN / math.prod(whole(g.shape)))

    def _rows(self, held: State, i: int, j: int, like: Blocks) -> Tensor:
        """Rows i..j of P R, in the precision of a matrix like it."""
        return self.frame.up(held["basis"], held["low"], i, j, like)

    def _mean_below(self, held: State, like: Blocks, hp: Hyper) -> Tensor:
        """The mean magnitude of the negative elements of P R, 0-D; 0 where there is none."""
        parts = []
        for i, j in walk(like.ranges(), like.device):
            below = self._rows(held, i, j, like).clamp_(max=0.0)
            parts.append(torch.stack(((below < 0.0).sum().double(), -below.sum(dtype=torch.float64))))
        count, total = hp.total(torch.stack(parts).sum(0)).unbind()
        return (total / count.clamp(min=1.0)).float()

    def _store(self, x: Blocks, held: State, ok: Tensor, name: str, hp: Hyper) -> None:
        """Find P and R of a moment, from those of the one before; where ok is False, leave them."""
        shape = self.frame.low_shape(x.shape)
        low = own_rows(hp.gaussian(whole(shape), name).mul_(STIR * max(whole(shape)) ** -0.5), shape)
        low.addcmul_(held["low"], 1.0 / self.frame.largest(held["low"], x)[0])
        basis = hp.gaussian(self.frame.size(x.shape), f"{name} anew")
        for _ in range(self.iterations + (hp.first or hp.step == 0)):
            y = self.frame.across(low, x)
            del low  # of the long side, as large as half of what is held
            basis = orthonormal(unit(y, basis)[0])
            low = self.frame.down(basis, x)
        for key, value in (("basis", basis), ("low", low)):
            torch.where(ok, value, held[key], out=held[key])
