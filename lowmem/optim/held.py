"""A moment as it is held between steps, seen as a matrix.

A rule that needs the whole tensor and holds a moment of the weight's size (Muon's
momentum) can neither decode all of it at once nor hand it to the frame. It reads it
by blocks like a gradient, and moves it by blocks: decode, move, encode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowmem.optim.blocks import BLOCK, Blocks, Dense
from lowmem.optim.codecs.blockwise import Codec
from lowmem.optim.engine import noise
from lowmem.optim.engine.cutting import pad, pieces, walk
from lowmem.optim.formulas import Formula, Held, Leaf, together
from lowmem.optim.terms.changes import Permutation, Rotation
from lowmem.optim.terms.codes import Decoded, Gathered, Stored, Towards, finer, shared
from lowmem.optim.terms.hyper import ChunkHyper, Hyper
from lowmem.optim.terms.state import Constant, Constants, State, part

LEAST = 32
"""Elements of a part of a block, at least, that is read with the scale of its block."""


def tables(codec: Codec) -> Constants:
    """The constants of a codec."""
    return {
        key: Constant(key, functools.partial(_table, codec, key))
        for key in codec.shared(torch.empty(0, device="meta"))
    }


def _table(codec: Codec, key: str, device: torch.device) -> Tensor:
    return codec.shared(torch.empty(0, device=device))[key]


class HeldMoment(Held):
    """A held (m, n) moment; looking decodes.

    Args:
        codec: how it is held; state: what is held.
        constants: the codec's.
        shape: (m, n).
        hp: of this step; names the random streams of a codec that rounds at random.
    """

    def __init__(
        self, codec: Codec, state: State, constants: Mapping[str, Tensor], shape: tuple[int, int], hp: Hyper
    ) -> None:
        super().__init__(shape, None, hp.weight.device)
        self.codec, self.state, self.constants, self.hp = codec, state, constants, hp

    def chunk(self, start: int, stop: int) -> Tensor:
        """Flat elements start..stop, decoded; not to be written to."""
        first = start // self.codec.grain * self.codec.grain
        cut = {key: padded for key, _, padded in self._cut(first, stop - first)}
        return self.codec.decode(cut, self.constants).view(-1)[start - first : stop - first]

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j, decoded; not to be written to."""
        n = self.shape[1]
        return self.chunk(i * n, j * n).view(j - i, n)

    def move_(self, f: Callable[[Tensor, int, int], Tensor], ok: Tensor) -> None:
        """Replace the moment, piece by piece, and store it.

        Args:
            f: (old elements, start, stop) to the new elements start..stop, flat fp32.
            ok: 0-D bool; False leaves the moment as it is.
        """
        total = self.shape[0] * self.shape[1]
        step = BLOCK // self.codec.grain * self.codec.grain
        for start in walk(range(0, total, step), self.device):
            stop = min(total, start + step)
            old = self.chunk(start, stop)
            self._store(start, torch.where(ok, f(old, start, stop), old), ok)

    def moving(
        self, f: Callable[..., Tensor], of: Sequence[Blocks], ok: Tensor, across: Sequence[Tensor] = ()
    ) -> None:
        """Replace the moment by f(old, *of, *across), element by element, where ok.

        Args:
            f: of a module, or a frozen value: rows to rows; of: the matrices that it takes beside the moment.
            ok: 0-D bool; across: 0-D tensors.
        """
        rows, x = self._by_rows(), of[0] if len(of) == 1 else Formula(together, of)
        other = None if rows or self.hp.passes.leaf(x) is None else self._by_blocks(of)
        if other:
            other.moving(
                f,
                [Dense(y.tensor.view(other.shape), y.factor) for y in of if isinstance(y, Dense)],
                ok,
                across,
            )
            return
        if rows is None or self.codec.spills or self.hp.passes.leaf(x) is None:
            self.move_(lambda old, a, b: f(old, *(x.chunk(a, b).float() for x in of), *across), ok)
            return
        hp, streams = self.hp, self.codec.streams
        starts = (noise.starts(self.shape, self.device) + hp.offset,) if streams else ()
        given = (ok, hp.keys(streams), *across, *self._tables())
        hp.sweep(Stored(self.codec, f, len(of), shared(self.codec)), x, (*rows, *starts), given)

    def _by_blocks(self, of: Sequence[Blocks]) -> HeldMoment | None:
        """The moment with a block for a row, beside matrices that can be seen so; None where they cannot."""
        count, grain = self.shape[0] * self.shape[1], self.codec.grain
        seen = all(isinstance(x, Dense) and x.tensor.is_contiguous() for x in of)
        if not seen or count % grain or self.shape[1] == grain:
            return None
        return HeldMoment(self.codec, self.state, self.constants, (count // grain, grain), self.hp)

    def _tables(self) -> list[Tensor]:
        return [self.constants[key][None] for key in shared(self.codec)]

    def _by_rows(self) -> list[Tensor] | None:
        """What is held as tensors with the rows of the matrix; None where a block is of more than one."""
        (m, n), hp = self.shape, self.hp
        held = [self.state[key] for key in self.codec.per]
        split = not m * n or n % self.codec.grain or not all(x.is_contiguous() for x in held)
        if split or hp.offset + m * n > 1 << 31:
            return None
        return [x.view(m, -1) for x in held]

    def towards(self, g: Blocks, rate: float) -> Blocks:
        """The average after g, old + rate (g - old), before it is encoded; the moment stays as it is."""
        return Formula(Towards(rate), (self, g))

    def following(self, g: Blocks, rate: float, ok: Tensor) -> Callable[[], None]:
        """What stores the average after g, where ok (0-D bool): the commit of a `Direction`."""
        return lambda: self.moving(Towards(rate), (g,), ok)

    def leaf(self) -> Leaf | None:
        """What is held, and the tables."""
        rows = self._by_rows()
        if rows is None:
            return self._leaf_across_blocks()
        read = Decoded(self.codec, shared(self.codec))
        return Leaf(read, tuple(rows), tuple(self._tables()), read)

    def _leaf_across_blocks(self) -> Leaf | None:
        """What is held where blocks do not end with rows: elements as they are, all that blocks have."""
        (m, n), codec = self.shape, self.codec
        each = [key for key, per in codec.per.items() if per < codec.grain]
        whole = [key for key in codec.per if key not in each]
        some = math.gcd(n, codec.grain)
        if some < LEAST or m * n % codec.grain or self.hp.offset + m * n > 1 << 31 or len(whole) != 1:
            return None
        read = Gathered(codec, finer(codec, some), tuple(each), whole[0], shared(codec))
        place = torch.arange(n, dtype=torch.int32, device=self.device)
        down = (
            *(self.state[key].view(m, -1) for key in each),
            noise.starts(self.shape, self.device)[:, None],
        )
        return Leaf(read, down, (place, self.state[whole[0]][None], *self._tables()), read)

    def permute_(self, index: Tensor, axis: int, ok: Tensor) -> None:
        """Let each row or column be the one that was at its index, or zero where that is -1.

        Args:
            index: of each row (axis 0) or column (axis 1), int64; ok: 0-D bool, False leaves all as it is.
        """
        m, n = self.shape
        there, known = index.clamp(min=0), index >= 0
        whole = torch.empty(m, n, device=self.device)
        for start in walk(range(0, m * n, BLOCK), self.device):
            stop = min(m * n, start + BLOCK)
            whole.view(-1)[start:stop] = self.chunk(start, stop)

        def moved(old: Tensor, start: int, stop: int) -> Tensor:
            i, j = start // n, -(-stop // n)
            if axis == 0:
                rows = torch.where(known[i:j, None], whole.index_select(0, there[i:j]), 0.0)
            else:
                rows = torch.where(known, whole[i:j].index_select(1, there), 0.0)
            return rows.reshape(-1)[start - i * n : stop - i * n]

        self.move_(moved, ok)

    def _cut(self, start: int, length: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What is held of a range that begins with a block: the key, the pieces, and the same padded."""
        size = -(-length // self.codec.grain) * self.codec.grain
        for key, per in self.codec.per.items():
            piece = pieces(self.state[key], per, start, length)
            entries = -(-size // per)
            whole = piece.shape[0] == entries
            yield key, piece, piece if whole else pad(piece, entries, self.codec.fill.get(key, 0))

    def _store(self, start: int, value: Tensor, ok: Tensor) -> None:
        length, grain = value.numel(), self.codec.grain
        size = -(-length // grain) * grain
        new = self.codec.encode(
            value if size == length else pad(value, size), self._hyper(start, size), self.constants
        )
        for key, piece, _ in self._cut(start, length):
            # encoding again what was decoded may change its scale
            piece.copy_(torch.where(ok, new[key].view(-1, *piece.shape[1:])[: piece.shape[0]], piece))

    def _hyper(self, start: int, size: int) -> ChunkHyper:
        """What a codec may know; of all, it asks for random bits alone."""
        device, hp, streams = self.device, self.hp, self.codec.streams
        true = torch.ones((), dtype=torch.bool, device=device)
        start += hp.offset
        rates, keys = hp.rates(), hp.keys(streams, start >> 32)
        place = noise.positions(start, size if streams else 0, device)
        return ChunkHyper(rates, rates[0], rates[1], true, true, place, keys, streams)


def rotate_(
    s: State, names: Collection[str], rotated: Callable[..., Mapping[str, Tensor]], turn: Rotation,
    shape: tuple[int, int], hp: Hyper,
) -> None:  # fmt: skip
    """Turn moments that are held in fp32, strip by strip, so that what is made of a strip stays small.

    Args:
        s: the state; names: of the moments.
        rotated: (moments, turn, age, hp) to the moments as they are afterwards.
        turn: the change; shape: of a moment; hp: of this step.
    """
    axis, age = 1 - turn.axis, s.get("age", turn.ok)
    width = max(1, BLOCK // shape[1 - axis])
    for start in range(0, shape[axis] if names else 0, width):
        length = min(width, shape[axis] - start)
        strip = {name: s[name].narrow(axis, start, length) for name in names}
        for name, value in rotated(strip, turn, age, hp).items():
            strip[name].copy_(value)


def permute_(
    s: State, codecs: Mapping[str, Codec], change: Permutation, shape: tuple[int, int], hp: Hyper
) -> None:
    """Coordinates take their moments and their ages along; new ones begin at zero, with age 0.

    Args:
        s: the state; codecs: of the moments, by name.
        change: which goes where; shape: of a moment; hp: of this step.
    """
    for name, held in codecs.items():
        HeldMoment(held, part(s, name), s, shape, hp).permute_(change.index, change.axis, change.ok)
    if "age" in s:
        age = s["age"][change.index.clamp(min=0)]
        s["age"].copy_(torch.where(change.index >= 0, age, 0))


def weighted(
    s: State, moments: Mapping[str, tuple[Codec, float]], shape: tuple[int, int], hp: Hyper
) -> Blocks | None:
    """A sum of moments, each with a factor; None of none.

    Args:
        s: the state; moments: codec and factor by name.
        shape: of a moment; hp: of this step.
    """
    held = [(HeldMoment(codec, part(s, name), s, shape, hp), f) for name, (codec, f) in moments.items()]

    def rows(i: int, j: int) -> Tensor:
        return torch.stack([factor * moment.rows(i, j) for moment, factor in held]).sum(0)

    return Blocks(shape, rows, hp.weight.device) if held else None


def pooled(x: Tensor, each: int) -> Tensor:
    """Means over blocks of `each` elements: (rows, width) to (rows, width / each)."""
    return x.view(x.shape[0], -1, each).mean(-1)


def spread(x: Tensor, each: int) -> Tensor:
    """A number of each block for all of its elements: the inverse shape of `pooled`."""
    return x.repeat_interleave(each, dim=1)
