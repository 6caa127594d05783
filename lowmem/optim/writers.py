"""How the new weight is stored.

A step in a 16-bit weight is often smaller than half a unit in the last place
and vanishes when rounded to nearest; so does decoupled decay. Three remedies:
round at random with the right mean, carry the lost part along (Kahan), or hold
more bits of the weight than the model computes with (split).

    W <- round(decay W - lr D)

Writers are pure and element-wise, so they fuse into the kernel of the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.engine import noise
from lowmem.optim.int8.writer import Int8Writer
from lowmem.optim.terms.hyper import ChunkHyper
from lowmem.optim.terms.products import HALF
from lowmem.optim.terms.state import State


class Writer(Protocol):
    """How a weight takes a step. Flat chunks: w in the weight's dtype, d in fp32."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def beside(self) -> tuple[str, ...]:
        """What of the weight itself, besides what a chunk is of, the state of a chunk brings."""

    @property
    def grain(self) -> int:
        """Elements of a block that is written as one."""

    @property
    def per(self) -> Mapping[str, int]:
        """Elements for each entry of a state tensor, where that is not 1."""

    def read(self, w: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """The weight chunk in fp32."""

    def init(self, x: Tensor) -> State:
        """What is held beside a weight like x, one entry for each element."""

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """The new weight chunk and the new state."""


class Floats:
    """What writers of floating-point weights have in common: each element is written for itself."""

    beside: ClassVar[tuple[str, ...]] = ()
    grain: ClassVar[int] = 1
    per: ClassVar[Mapping[str, int]] = MappingProxyType({})

    def read(self, w: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """The weight in fp32."""
        return w.float()


def _stepped(w: Tensor, d: Tensor, hp: ChunkHyper, decay: Tensor) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    return w.to(wide) * decay - hp.lr * d.to(wide)


@dataclass(frozen=True)
class Nearest(Floats):
    """Round to nearest; holds 0 bytes. Right for fp32 and float64 weights."""

    streams: tuple[str, ...] = ()

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """W <- nearest(decay W - lr D)."""
        return _stepped(w, d, hp, decay).to(w.dtype), {}


@dataclass(frozen=True)
class Stochastic(Floats):
    """Round up or down at random with the right mean; holds 0 bytes.

    The default for bf16 and fp16 weights: a step of a hundredth of a unit in
    the last place is taken once in a hundred steps instead of never.
    """

    streams: tuple[str, ...] = ("weight",)

    def init(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """W <- stochastic(decay W - lr D)."""
        new = _stepped(w, d, hp, decay)
        return noise.round_stochastic(new, w.dtype, hp.noise("weight")), {}


@dataclass(frozen=True)
class Kahan(Floats):
    """Carry what rounding lost into the next step; holds 2 bytes for each 16-bit weight."""

    streams: tuple[str, ...] = ()

    def init(self, x: Tensor) -> State:
        """The part of the weight that its dtype could not hold, in that dtype."""
        return {"compensation": torch.zeros(x.numel(), dtype=x.dtype, device=x.device)}

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """W + c <- decay (W + c) - lr D, split into its nearest 16-bit value and the rest."""
        exact = (w.float() + s["compensation"].float()) * decay - hp.lr * d
        # what was lost may be half a unit: a weight that is not stepped would round away from where it is
        new = torch.where(hp.finite, noise.round_nearest(exact, w.dtype), w.float())
        return new.to(w.dtype), {"compensation": (exact - new).to(w.dtype)}


@dataclass(frozen=True)
class Halves(Floats):
    """A bf16 weight and 8 more bits of it; holds 1 byte for each weight.

    The correction is in 128ths of half a unit in the last place (FlashOptim,
    arXiv 2602.23349): together they resolve what a 24-bit float resolves.
    """

    streams: tuple[str, ...] = ()

    def init(self, x: Tensor) -> State:
        """The correction, int8."""
        return {"correction": torch.zeros(x.numel(), dtype=torch.int8, device=x.device)}

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """Decode W + c half(W) / 128, step, encode."""
        exact = w.float() + s["correction"].float() * (_half_ulp(w.float()) / 128.0)
        exact = exact * decay - hp.lr * d
        new = noise.round_nearest(exact, torch.bfloat16)
        rest = (exact - new) / _half_ulp(new) * 128.0
        return new.to(torch.bfloat16), {"correction": rest.round().clamp(-127, 127).to(torch.int8)}


def _half_ulp(x: Tensor) -> Tensor:
    """Half a unit in the last place of a bf16 number: its power of two times 2^-8."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp(min=2.0**-126) * 2.0**-8


@dataclass(frozen=True)
class Eco(Stochastic):
    """Of int8 weights, what rounding loses is carried along (`int8.writer`); others are `Stochastic`."""


NEAREST = Nearest()
INT8: Mapping[type, Int8Writer] = {
    Stochastic: Int8Writer("stochastic"),
    Eco: Int8Writer("eco"),
    Nearest: Int8Writer("nearest"),
}
"""What the writers are for int8 weights."""


def select(writer: Writer, dtype: torch.dtype, coded: bool = False) -> Writer:
    """The writer that a weight really has.

    fp32 and float64 weights lose nothing that matters and are always written to nearest.

    Args:
        writer: of the strategy.
        dtype: of the weight; coded: whether it is held as int8 codes.

    Raises:
        UserError: a weight that the writer cannot take.

    Example:
        >>> select(Kahan(), torch.float32)
        Nearest(streams=())
    """
    if coded:
        if type(writer) not in INT8:
            raise UserError(
                f"writer {type(writer).__name__.lower()!r} is for weights of 16 bits; for int8 weights take "
                f"'stochastic', 'eco' or 'nearest'"
            )
        return INT8[type(writer)]
    if dtype.is_complex:
        raise UserError(f"weights of {dtype} have no order to round in; train torch.view_as_real of them")
    if dtype in (torch.float32, torch.float64):
        return NEAREST
    if dtype not in HALF:
        raise UserError(
            f"weights of {dtype} take no steps; hold them as float32, float64, bfloat16 or float16, "
            f"or as int8 codes"
        )
    if isinstance(writer, Halves) and dtype == torch.float16:
        raise UserError("writer 'split' holds bf16 weights; for fp16 weights take 'kahan' or 'stochastic'")
    return writer
