"""How one moment is held between steps.

A codec turns a flat fp32 moment into a few plain tensors and back. The order is
the same for every block-wise codec: decode, move the average with the fresh
gradient, use the un-encoded result for the step, encode. So codec and rule are
independent choices. Block-wise codecs cut the last dimension, a multiple of
their grain; the frame pads the tail, so any size and shape can be held, and
never changes dtype silently.

    Floats        fp32, or bf16 written with stochastic rounding
    Blockwise    8 or 4 bits of the dynamic map, one fp32 scale for each block
    Companded    8 bits, softsign for signed moments, square root for the rest

Moments are never silently held in the weight's dtype: an average with
beta2 = 0.999 in bf16, rounded to nearest, does not move at all.

Two things hold for every codec. Of a moment without a sign, nothing that was not
zero decodes to zero: a second moment that is lost beside a first one that is not
makes the next step m / eps, thousands of times the learning rate. It is held by
the smallest code instead, which makes the step too small. And nothing that was
finite decodes to infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.codecs.dynamic import dynamic_tables, nearest_code
from lowmem.optim.engine import noise
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import ChunkHyper
from lowmem.optim.terms.state import State

BF16_MAX = torch.finfo(torch.bfloat16).max
LEAST_ROOT, LARGEST_ROOT = 2.0**-55, (2.0 - 2.0**-7) * 2.0**63
"""Scales of roots that bf16 has, and fp32 their squares: of one 255th of the least, and of the largest."""
NOTHING = 1e-12
"""The scale of a block of zeros: torchao's, which has no smaller one for any block."""

STATES = ("fp32", "bf16", "int8", "int4", "companded8")


class Codec(Protocol):
    """How one moment is held. Values are fp32, (..., k grain); `constants` are the shared tensors."""

    @property
    def grain(self) -> int: ...
    @property
    def per(self) -> Mapping[str, int]: ...
    @property
    def fill(self) -> Mapping[str, int]:
        """Entries that stand for zero beside any scale; 0 where a tensor is not named."""

    @property
    def streams(self) -> tuple[str, ...]: ...
    @property
    def spills(self) -> int:
        """Bytes for each element that one kernel of a card leaves the next, to make bytes of them."""

    def init(self, x: Tensor) -> State:
        """What is held for a tensor like x; decodes to zero."""

    def shared(self, x: Tensor) -> State:
        """Constant tables, held once for each optimizer."""

    def decode(self, s: State, constants: Mapping[str, Tensor]) -> Tensor:
        """The moment in fp32."""

    def encode(
        self, value: Tensor, hp: ChunkHyper, constants: Mapping[str, Tensor], root: Tensor | None = None
    ) -> State:
        """What is held of a moment; `root` is its square root, where the rule has taken it."""


@dataclass(frozen=True)
class Floats:
    """A moment held as it is: 4 bytes (fp32) or 2 bytes (bf16) for each element.

    Args:
        dtype: torch.float32 or torch.bfloat16; bf16 is rounded at random, since
            rounding to nearest stops slow averages (see the module's docstring).
        stream: name of the random stream of the rounding.
        signed: whether the moment has a sign; without one, rounding stops above zero.
    """

    dtype: torch.dtype = torch.float32
    stream: str = "moment"
    signed: bool = True
    grain: int = 1
    spills: ClassVar[int] = 0

    @property
    def per(self) -> Mapping[str, int]:
        """One entry for each element."""
        return {"": 1}

    @property
    def fill(self) -> Mapping[str, int]:
        """Zero is zero."""
        return {}

    @property
    def streams(self) -> tuple[str, ...]:
        """The stream of stochastic rounding, where there is one."""
        return () if self.dtype == torch.float32 else (self.stream,)

    def init(self, x: Tensor) -> State:
        """Zeros like x."""
        return {"": torch.zeros(x.shape, dtype=self.dtype, device=x.device)}

    def shared(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def decode(self, s: State, constants: Mapping[str, Tensor]) -> Tensor:
        """A cast."""
        return s[""].float()

    def encode(
        self, value: Tensor, hp: ChunkHyper, constants: Mapping[str, Tensor], root: Tensor | None = None
    ) -> State:
        """A cast, at random for bf16."""
        if self.dtype == torch.float32:
            return {"": value}
        if self.signed:
            value = value.clamp(-BF16_MAX, BF16_MAX)
        else:
            value = torch.where(value > 0.0, value.clamp(TINY, BF16_MAX), 0.0)
        return {"": noise.round_stochastic(value, self.dtype, hp.noise(self.stream))}


@dataclass(frozen=True)
class Blockwise:
    """The dynamic map of 8-bit optimizers (arXiv 2110.02861), block by block.

    x -> scale = max |x| over the block, code = nearest entry of the map to x / scale.

    Bytes for d elements: d + 4 ceil(d / 256) with 8 bits, ceil(d / 2) + 4 ceil(d / 128)
    with 4 bits. Without a sign, only zero takes the code of zero in 8 bits: what the nearest
    entry would make zero takes the entry above it, 3.25e-7. The 4-bit map has no zero
    there, to the same end (arXiv 2309.01507). All other 8-bit codes are those of torchao,
    bit for bit, where a block has an element of 1e-12 or none but zeros: the scale below that, which
    torchao does not have, lets second moments of gradients below 1e-6 move.

    Args:
        bits: 8 or 4.
        signed: whether the moment has a sign.
    """

    bits: int = 8
    signed: bool = True
    streams: tuple[str, ...] = ()

    @property
    def spills(self) -> int:
        """A code of 4 bits, before two of them make a byte."""
        return 1 if self.bits == 4 else 0

    @property
    def grain(self) -> int:
        """Elements of a block."""
        return 256 if self.bits == 8 else 128

    @property
    def per(self) -> Mapping[str, int]:
        """One scale a block; two 4-bit codes a byte."""
        return {"codes": 8 // self.bits, "scale": self.grain}

    @property
    def fill(self) -> Mapping[str, int]:
        """The code of zero, which signed maps have in their middle: code 0 is nearly minus the scale."""
        return {"codes": (0x77 if self.bits == 4 else 127) if self.signed else 0}

    @property
    def _name(self) -> str:
        return f"dynamic{self.bits}{'s' if self.signed else 'u'}"

    def init(self, x: Tensor) -> State:
        """Codes and scales of zero."""
        d = x.numel()
        return {
            "codes": torch.zeros(-(-d * self.bits // 8), dtype=torch.uint8, device=x.device),
            "scale": torch.zeros(-(-d // self.grain), device=x.device),
        }

    def shared(self, x: Tensor) -> State:
        """The map, and what finds the nearest entry without a search."""
        tables = dynamic_tables(self.bits, self.signed, x.device)
        return {f"{self._name}.{key}": table for key, table in tables.items()}

    def decode(self, s: State, constants: Mapping[str, Tensor]) -> Tensor:
        """map[code] scale."""
        codes = s["codes"]
        if self.bits == 4:
            codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)
        values = torch.nn.functional.embedding(codes.int(), constants[f"{self._name}.map"][:, None])[..., 0]
        return (_blocks(values, self.grain) * s["scale"].unsqueeze(-1)).flatten(-2)

    def encode(
        self, value: Tensor, hp: ChunkHyper, constants: Mapping[str, Tensor], root: Tensor | None = None
    ) -> State:
        """The code of the nearest entry; halfway goes up, and so does all that is above a map's zero."""
        blocks = _blocks(value, self.grain)
        top = blocks.abs().amax(-1)
        scale = torch.where(top > 0.0, top.clamp(min=TINY), NOTHING)
        sums = constants[f"{self._name}.sums"]
        codes = nearest_code((blocks / scale.unsqueeze(-1)).flatten(-2), sums)
        if self.bits == 4:
            # a byte is made of neighbours, by a kernel of its own on a card: it is to find bytes
            first, second = _blocks(_once(codes.to(torch.uint8)), 2).unbind(-1)
            return {"codes": first * 16 + second, "scale": scale}
        if not self.signed:
            # asked of the value: the quotient of two numbers 38 decades apart is 0
            codes = torch.maximum(codes, _above_zero(value))
        return {"codes": codes.to(torch.uint8), "scale": scale}


@dataclass(frozen=True)
class Companded:
    """8 bits after a curve that spreads small values (FlashOptim, arXiv 2602.23349).

    signed: z = 2y / (1 + |y|), code = round(127 z), y = z / (2 - |z|), with y = x / scale, scale = max |x|;
    unsigned: code = round(255 sqrt(x) / scale), at least 1 where x > 0, scale = max sqrt(x).

    Bytes for d elements: d + 2 ceil(d / 32). No table, exact zero, no tail that
    collapses. The scale is bf16 where the paper has fp16: moments below 6e-5 have no
    normal fp16 scale, and below 6e-8 none at all.

    Args:
        signed: whether the moment has a sign.
    """

    signed: bool = True
    grain: int = 32
    streams: tuple[str, ...] = ()
    spills: ClassVar[int] = 0

    @property
    def per(self) -> Mapping[str, int]:
        """One scale for each group of 32."""
        return {"codes": 1, "scale": self.grain}

    @property
    def fill(self) -> Mapping[str, int]:
        """Code 0 is zero."""
        return {}

    def init(self, x: Tensor) -> State:
        """Codes and scales of zero."""
        d = x.numel()
        dtype = torch.int8 if self.signed else torch.uint8
        scale = torch.zeros(-(-d // self.grain), dtype=torch.bfloat16, device=x.device)
        return {"codes": torch.zeros(d, dtype=dtype, device=x.device), "scale": scale}

    def shared(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def decode(self, s: State, constants: Mapping[str, Tensor]) -> Tensor:
        """The inverse of the curve, times the scale: with c = 127 z, z / (2 - |z|) is c / (254 - |c|)."""
        scale = s["scale"].float().unsqueeze(-1)
        codes = _blocks(s["codes"].float(), self.grain)
        if self.signed:  # in this order: 127 scales may have no fp32
            return (codes / (254.0 - codes.abs()) * scale).flatten(-2)
        root = codes * (scale * (1.0 / 255.0))
        return (root * root).flatten(-2)

    def encode(
        self, value: Tensor, hp: ChunkHyper, constants: Mapping[str, Tensor], root: Tensor | None = None
    ) -> State:
        """The curve at x / scale, 254 x / (scale + |x|); unsigned moments are held by their root."""
        if not self.signed:
            return self._encode_root(_blocks(value.sqrt() if root is None else root, self.grain))
        blocks = _blocks(value, self.grain)
        scale = blocks.abs().amax(-1).clamp(max=BF16_MAX).to(torch.bfloat16)
        # a block of zeros has scale 0: its codes are 0 / tiny, not 0 / 0
        held = _once(scale.float().clamp(min=4.0 * TINY) * 0.5).unsqueeze(-1)
        half = blocks * 0.5  # the sum of two halves is finite
        codes = (half / (half.abs() + held) * 254.0).round().to(torch.int32)
        return {"codes": codes.to(torch.int8).flatten(-2), "scale": scale}

    @staticmethod
    def _encode_root(blocks: Tensor) -> State:
        scale = blocks.amax(-1).clamp(LEAST_ROOT, LARGEST_ROOT).to(torch.bfloat16)
        # the scale may be rounded down: the largest root is then more than 255 of them
        codes = (blocks * _once(255.0 / scale.float()).unsqueeze(-1)).round().to(torch.int32)
        codes = torch.maximum(codes, _above_zero(blocks)).clamp(max=255)
        return {"codes": codes.to(torch.uint8).flatten(-2), "scale": scale}


def _above_zero(x: Tensor) -> Tensor:
    """1 where a number that is not negative is above zero, else 0, or less for -0; int32."""
    return x.view(torch.int32).clamp(max=1)


def _once(x: Tensor) -> Tensor:
    """What a compiler computes once and keeps, instead of again for every element of a block."""
    return x.as_strided(x.shape, x.stride())


def _blocks(x: Tensor, grain: int) -> Tensor:
    """The last dimension cut into blocks, (..., k, grain)."""
    return x.view(*x.shape[:-1], -1, grain)


def codec(states: str, *, signed: bool, stream: str) -> Codec:
    """The codec of a moment from the one word for state precision.

    Args:
        states: fp32, bf16, int8, int4 or companded8.
        signed: whether the moment has a sign.
        stream: the moment's name, for stochastic rounding.

    Raises:
        UserError: unknown word.

    Example:
        >>> codec("int8", signed=True, stream="exp_avg").grain
        256
    """
    if states not in STATES:
        raise UserError(f"unknown states {states!r}; {nearest(states, STATES)}")
    if states in ("fp32", "bf16"):
        return Floats(stream=stream) if states == "fp32" else Floats(torch.bfloat16, stream, signed)
    if states == "companded8":
        return Companded(signed)
    return Blockwise(8 if states == "int8" else 4, signed)
