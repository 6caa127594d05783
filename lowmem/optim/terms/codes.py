"""What a kernel makes of what is held of a moment, row by row, and what it stores of it.

Rows may end within a block of a codec. Then what blocks have, such as their scale, is looked up for the
largest parts of blocks that rows are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from lowmem.optim.codecs.blockwise import Codec
from lowmem.optim.terms.hyper import ChunkHyper


@dataclass(frozen=True)
class Towards:
    """old + rate (new - old)."""

    rate: float

    def __call__(self, old: Tensor, new: Tensor) -> Tensor:
        """Of row blocks."""
        return old + self.rate * (new - old)


@dataclass(frozen=True)
class Stored:
    """A pass that moves a moment: decode, move, encode, where ok.

    Args:
        codec: how it is held; f: old rows, those of some matrices and what else to what is held.
        matrices: how many; shared: keys of the tables.
    """

    codec: Codec
    f: Callable[..., Tensor]
    matrices: int
    shared: tuple[str, ...]

    def __call__(self, *given: Any) -> None:
        """Rows of matrices; what is held of them; starts of rows, for noise; ok, keys, more; tables."""
        keys, shared = tuple(self.codec.per), self.shared
        of, given = given[: self.matrices], given[self.matrices :]
        held, given = given[: len(keys)], given[len(keys) :]
        first, (ok, words, *rest) = (given[0], given[1:]) if self.codec.streams else (None, given)
        more, tables = rest[: len(rest) - len(shared)], rest[len(rest) - len(shared) :]
        constants = {key: table[0] for key, table in zip(shared, tables, strict=True)}
        state = dict(zip(keys, held, strict=True))
        value = self.f(self.codec.decode(state, constants), *of, *more)
        column = torch.arange(value.shape[1], dtype=torch.int32, device=value.device)
        place = column if first is None else first[:, None] + column
        hp = ChunkHyper(ok, ok, ok, ok, ok, place, words, self.codec.streams)
        for key, kept in self.codec.encode(value, hp, constants).items():
            state[key].copy_(torch.where(ok, kept.view(state[key].shape), state[key]))


def shared(codec: Codec) -> tuple[str, ...]:
    """Keys of the tables of a codec."""
    return _tables_of(cast("Hashable", codec))


@functools.cache
def _tables_of(codec: Any) -> tuple[str, ...]:
    return tuple(codec.shared(torch.empty(0, device="meta")))


@dataclass(frozen=True)
class Decoded:
    """What a kernel makes of what is held of rows."""

    codec: Codec
    shared: tuple[str, ...]

    def __call__(self, held: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
        """Rows in fp32."""
        constants = {key: table[0] for key, table in zip(self.shared, tables, strict=True)}
        return self.codec.decode(dict(zip(self.codec.per, held, strict=True)), constants)


@dataclass(frozen=True)
class Gathered:
    """What a kernel makes of rows whose blocks begin in others: of parts of blocks, with the scale of theirs.

    Args:
        codec: how the moment is held; finer: the same with parts of blocks.
        each: keys of what elements have; scale: of what blocks have; shared: of the tables.
    """

    codec: Codec
    finer: Codec
    each: tuple[str, ...]
    scale: str
    shared: tuple[str, ...]

    def __call__(self, held: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
        """Rows in fp32; beside them the places in a row, the scales of all blocks, and the tables."""
        place, scales, *tables = beside
        block = (held[-1] + place[:: self.finer.grain]) // self.codec.grain
        state = {**dict(zip(self.each, held, strict=False)), self.scale: scales[0][block]}
        constants = {key: table[0] for key, table in zip(self.shared, tables, strict=True)}
        return self.finer.decode(state, constants)


def finer(codec: Codec, grain: int) -> Codec:
    """The codec with smaller blocks: they decode alike, with the scale of the block that they are part of."""
    return _finer(cast("Hashable", codec), grain)


@functools.cache
def _finer(codec: Any, grain: int) -> Codec:
    names = [field.name for field in fields(codec)]
    if "grain" in names:
        return cast("Codec", replace(codec, grain=grain))
    kind = type(codec)
    made = type(kind.__name__, (kind,), {"grain": grain})
    return cast("Codec", made(**{name: getattr(codec, name) for name in names}))
