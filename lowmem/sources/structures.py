"""Directions with structure: of low rank, of small weights alone, of scales in proportion to themselves.

    LowRank    Z = U V' / sqrt(rank), V kept for some steps   (LOZO, arXiv 2410.07698)
    Sparse     z where |w| is among the smallest of its tensor  (Sparse MeZO, arXiv 2402.15751)
    Scales     s <- s exp(eps z), of quantized weights        (QZO, arXiv 2505.13430)

All have elements of variance one that are not correlated, so that E[(g'z) z] = g
needs no factor (with U V' itself, as LOZO writes it, eps is sqrt(rank) times ours).
What a direction needs to know of a weight is read off the weight as it is, at each
step: nothing is held, and a resumed run needs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import matrix_shape
from lowmem.optim.engine.cutting import pad, read_flat
from lowmem.optim.source import Named, Query, trainable
from lowmem.optim.terms.state import State
from lowmem.sources.directions import Pen, Perturbation, displace, numbers, wrapped
from lowmem.sources.quantized import scales

SAMPLE = 1 << 14
"""Elements of a tensor from which a quantile is found."""


class Structure(Protocol):
    """Which directions are drawn, and of which tensors; a frozen dataclass.

    Attributes:
        quantized: whether these are scales of quantized weights.
        on_rows: an element of a direction follows from its index, so that some rows can be displaced alone.
        holds: whether something is held for each tensor.
    """

    @property
    def quantized(self) -> bool: ...
    @property
    def on_rows(self) -> bool: ...
    @property
    def holds(self) -> bool: ...

    def init(self, x: Tensor) -> State:
        """What is held for a tensor like x."""

    def trained(self, model: nn.Module) -> Named:
        """Names and tensors that are displaced and stepped."""

    def settle_(self, name: str, p: nn.Parameter, slopes: Sequence[tuple[float, Perturbation]]) -> None:
        """Called when a tensor has been stepped, with the slopes along each direction."""

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """The k-th direction of an evaluation."""


@dataclass(frozen=True)
class Free:
    """Every element by itself."""

    on_rows: ClassVar[bool] = True
    holds: ClassVar[bool] = False

    @property
    def quantized(self) -> bool:
        """They are parameters."""
        return False

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def trained(self, model: nn.Module) -> Named:
        """Parameters that require gradients."""
        return trainable(model)

    def settle_(self, name: str, p: nn.Parameter, slopes: Sequence[tuple[float, Perturbation]]) -> None:
        """Nothing."""

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """Named by seed, step, evaluation and k."""
        return Perturbation(noise, (query.seed, query.step, query.index, k), query.compile)


@dataclass(frozen=True)
class LowRank(Free):
    """Z = U V' / sqrt(rank) for matrices; vectors as ever.

    Holds nothing; while a module runs, 4 n rank bytes for an (m, n) weight.

    Args:
        rank: columns of U and V; gap: steps for which V stays, U is new in each.

    Raises:
        UserError: a rank or gap below 1.
    """

    rank: int = 2
    gap: int = 50
    on_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("update_gap", self.gap)):
            if value < 1:
                raise UserError(f"{name} of a low-rank direction is 1 or more, got {value}")

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """U named by the evaluation, V by the seed and the window of steps."""
        name = (query.seed, query.step, query.index, k)
        return _LowRankDirection(noise, name, query.compile, self.rank, query.step // self.gap)


@dataclass(frozen=True)
class Sparse(Free):
    """Only weights whose size is in the lower part of their tensor are displaced and stepped.

    The bound is the quantile of a sample of the tensor's sizes, taken anew at each step.

    Args:
        share: part of the weights that moves, in (0, 1].

    Raises:
        UserError: another share.
    """

    share: float = 0.25
    on_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise UserError(
                f"share is the part of the weights that moves, above 0 and at most 1, got {self.share}"
            )

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """Masked where it is looked at."""
        name = (query.seed, query.step, query.index, k)
        return _SparseDirection(noise, name, query.compile, self.share)


@dataclass(frozen=True)
class Scales:
    """The scales of 4-bit weights: s <- s exp(eps z), so that one radius serves every quantizer.

    The slope is that of log s, and the gradient s c z; a step that would cross zero ends there.
    """

    quantized: bool = True
    on_rows: ClassVar[bool] = False
    holds: ClassVar[bool] = False

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def trained(self, model: nn.Module) -> Named:
        """Scales of every quantized layer."""
        return scales(model)

    def settle_(self, name: str, p: nn.Parameter, slopes: Sequence[tuple[float, Perturbation]]) -> None:
        """No scale below zero."""
        p.detach().clamp_(min=0.0)

    def direction(self, noise: str, query: Query, k: int) -> Perturbation:
        """As free ones are named."""
        return _ScalesDirection(noise, (query.seed, query.step, query.index, k), query.compile)


class Structured(Pen):
    """Draws values, and lays them on a weight, by plain operations."""

    def __init__(self, z: Perturbation, parameter: str, like: Tensor, scale: float) -> None:
        super().__init__(z, parameter, like, scale)
        self.like = like

    def values(self, at: int, size: int, position: Tensor) -> Tensor:
        """Elements of z from `at` on, flat fp32."""
        return numbers(self.noise, position, size, self.keys(at))

    def fill(self, out: Tensor, w: Tensor | None, at: int) -> None:
        """Write scale z, or w + scale z."""
        position = torch.full((), wrapped(at), dtype=torch.int32, device=self.device)
        x = self.values(at, out.numel(), position).mul_(self.factor)
        if w is None:
            out.copy_(x)
        else:
            self.lay(out, w, x, position, self.keys(at)[2])

    def lay(self, out: Tensor, w: Tensor, x: Tensor, position: Tensor, key: Tensor) -> None:
        """Write w + x."""
        displace(out, w, x, position, key)


@dataclass(frozen=True)
class _LowRankDirection(Perturbation):
    rank: int = 2
    window: int = 0

    def pen(self, parameter: str, like: Tensor, scale: float = 1.0) -> Pen:
        if like.dim() < 2:
            return Pen(self, parameter, like, scale)
        return _LowRankPen(self, parameter, like, scale)


class _LowRankPen(Structured):
    def __init__(self, z: _LowRankDirection, parameter: str, like: Tensor, scale: float) -> None:
        super().__init__(z, parameter, like, scale)
        self.n, self.rank, seed = matrix_shape(like.shape)[1], z.rank, z.name[0]
        self._left = Perturbation(z.noise, (*z.name, 0)).pen(parameter, like, z.rank**-0.5)
        right = Perturbation(z.noise, (seed, z.window))
        self._right = right.draw(parameter, like, 0, self.n * z.rank).view(self.n, z.rank).t().contiguous()

    def values(self, at: int, size: int, position: Tensor) -> Tensor:
        first, last = at // self.n, -(-(at + size) // self.n)
        left = self._left.draw(first * self.rank, last * self.rank).view(-1, self.rank, 1)
        # one product after another: a matrix product has other last bits in other shapes
        terms = (left[:, k] * self._right[k] for k in range(self.rank))
        rows = functools.reduce(Tensor.add_, terms)
        return rows.view(-1)[at - first * self.n :][:size]


@dataclass(frozen=True)
class _SparseDirection(Perturbation):
    share: float = 1.0

    def pen(self, parameter: str, like: Tensor, scale: float = 1.0) -> Pen:
        return _SparsePen(self, parameter, like, scale)


class _SparsePen(Structured):
    def __init__(self, z: _SparseDirection, parameter: str, like: Tensor, scale: float) -> None:
        super().__init__(z, parameter, like, scale)
        self.bound = _quantile(like, z.share)

    def values(self, at: int, size: int, position: Tensor) -> Tensor:
        length = max(0, min(size, self.like.numel() - at))
        inside = read_flat(self.like, at, length).abs() <= self.bound
        return super().values(at, size, position).mul_(pad(inside, size))


@dataclass(frozen=True)
class _ScalesDirection(Perturbation):
    def pen(self, parameter: str, like: Tensor, scale: float = 1.0) -> Pen:
        return _ScalesPen(self, parameter, like, scale)


class _ScalesPen(Structured):
    def gradient(self, start: int, stop: int) -> Tensor:
        """Times the scale itself."""
        return self.draw(start, stop).mul_(read_flat(self.like, start, stop - start))

    def lay(self, out: Tensor, w: Tensor, x: Tensor, position: Tensor, key: Tensor) -> None:
        """Write w exp(x)."""
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        displace(out, w, wide * torch.expm1(x), position, key)


def _quantile(w: Tensor, share: float) -> Tensor:
    """The size below which a share of a tensor lies, by a sample at equal distances; 0-D."""
    count = w.numel()
    step = max(1, count // SAMPLE)
    sample = w.detach().reshape(-1)[::step] if w.is_contiguous() else w.detach().flatten()[::step]
    rank = max(1, round(share * sample.numel()))
    return sample.abs().kthvalue(min(rank, sample.numel())).values if count else w.new_zeros(())
