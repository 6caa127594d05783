"""What a part may know of the step that is taken.

There are two clocks. `Hyper.step` is a host integer and decides schedules; `age`, a
state tensor, counts the steps that the moments have seen and decides bias correction:
a skipped step does not age, a reset sets it to 0.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.engine import noise
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.engine.parcel import Contents, Parcel
from lowmem.optim.formulas import ByBlocks
from lowmem.optim.shards import Shard, shard_in
from lowmem.optim.terms.overall import Overall


@functools.lru_cache(1 << 16)
def stagger(name: str, gap: int) -> int:
    """The offset of a parameter's refreshes within the gap, from its name.

    >>> 0 <= stagger("layers.0.q_proj.weight", 200) < 200
    True
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % gap


class Lookup:
    """Small tensors of known values, made once for each value and device; the tables of ages; the parcels."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}
        self.tables: dict[Hashable, Any] = {}
        self._parcels: dict[torch.device, Parcel] = {}

    def __call__(self, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values as a 1-D tensor; not to be written to."""
        key = (values, dtype, device)
        if key not in self._made:
            if len(self._made) > 4096:
                self._made.clear()
            self._made[key] = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
        return self._made[key]

    def parcel(self, device: torch.device) -> Parcel:
        """What brings the numbers of each step to a device."""
        if device not in self._parcels:
            self._parcels[device] = Parcel(device)
        return self._parcels[device]


@dataclass
class Hyper:
    """What a rule may know of the step it takes.

    Args:
        step: completed steps of the group before this one (host clock, for schedules).
        name: the parameter's name; with `seed` it names every random stream.
        seed: the run's seed.
        lr, betas, eps, weight_decay: of the group, as floats.
        weight: the weight before the step, (m, n); its dtype is the precision of large products.
        advance: the frame's `Chunks.advance_`, for rules that hold a pointwise rule.
        passes: who takes a pass over a matrix, see `formulas`; the frame's `Passes`.
        first: the state was created for this step.
        heads: into which the weight's rows are cut, where it makes queries or keys; 0 elsewhere.
        shard: which rows of the tensor these are, where they are spread over ranks.
        sound: 0-D bool, where all ranks have agreed already whether the gradient is finite (`Rule.unsound`).
        constant: cache of small tensors.
        group: the parameter group that the numbers are from, as it is at any time.
        overall: what is known of all tensors, where a rule asks for it.
    """

    step: int
    name: str
    seed: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    weight: Blocks
    advance: Callable[..., Tensor]
    passes: ByBlocks = field(default_factory=ByBlocks)
    first: bool = False
    heads: int = 0
    constant: Lookup = field(default_factory=Lookup)
    shard: Shard | None = None
    sound: Tensor | None = None
    group: Mapping[str, Any] = field(default_factory=dict)
    overall: Overall | None = None

    @property
    def decay(self) -> float:
        """The factor of decoupled weight decay, 1 - lr weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    def vector(self, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Floats as a cached 1-D tensor on the weight's device."""
        return self.constant(values, dtype, self.weight.device)

    def rates(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale lr and decay on the weight's device, (2,); not to be written to."""
        values = (self.lr * scale, self.decay)
        if sizes(self.weight.device).at_hand or not self.group:
            return self.vector(*values, dtype=dtype)
        coded = "f" if dtype == torch.float32 else "d"
        again = functools.partial(_rates_of, self.group, scale, coded)
        sent = self._sent((*values, coded), _float_words, ("rates", id(self.group), scale, coded), again)
        return sent.view(dtype)

    @property
    def rate(self) -> Tensor:
        """lr on the weight's device, 0-D float64."""
        if sizes(self.weight.device).at_hand or not self.group:
            return self.vector(self.lr)[0]
        return self.rates(dtype=torch.float64)[0]

    def keys(self, streams: Sequence[str], upper: int = 0) -> Tensor:
        """Keys of the tensor's random streams at this step, (streams, 2) int32.

        Args:
            streams: their names; upper: the upper half of the 64-bit index of the elements.
        """
        if not streams:
            return torch.empty(0, 2, dtype=torch.int32, device=self.weight.device)
        if sizes(self.weight.device).at_hand or not self.group:
            names = [(self.seed, self.step, self.name, stream, upper) for stream in streams]
            return noise.key_tensor(names, self.weight.device)
        asked = (self.name, tuple(streams), upper)
        again = functools.partial(_keys_of, self.group, *asked)
        sent = self._sent((self.seed, self.step, *asked), _key_words, ("keys", *asked), again)
        return sent.view(-1, 2)

    def _sent(
        self, contents: Contents, words: Callable[[Contents], tuple[int, ...]], name: Hashable,
        again: Callable[[], Contents],
    ) -> Tensor:  # fmt: skip
        parcel = self.constant.parcel(self.weight.device)
        return parcel(self.step, contents, words, name, again)

    @property
    def share(self) -> float:
        """The part of the tensor that is held here."""
        return 1.0 if self.shard is None else self.shard.rows / self.shard.full[0]

    @property
    def offset(self) -> int:
        """Elements of the tensor before those held here."""
        return 0 if self.shard is None else self.shard.first * self.shard.width

    def inside(self, shape: tuple[int, int]) -> Hyper:
        """What a rule may know that steps a projected gradient of this shape: all of it is here, or rows."""
        if self.shard is None:
            return self
        shard = shard_in(shape)
        return replace(self, shard=shard, sound=self.sound if shard else None)

    def due(self, gap: int) -> bool:
        """Whether a refresh with this gap falls on this step: at first, then staggered by name."""
        return self.first or self.step == 0 or (self.step + stagger(self.name, gap)) % gap == 0

    def window(self, gap: int) -> int:
        """How many refreshes with this gap lie behind: what names a basis that is drawn and not held."""
        return _window(self.step, self.name, gap)

    def total(self, x: Tensor, op: str = "sum") -> Tensor:
        """Reduce over the shards of the tensor, "sum" or "max"; the same bits on all ranks."""
        if op not in ("sum", "max"):
            raise ValueError(f"total over shards: op is 'sum' or 'max', got {op!r}")
        return x if self.shard is None else self.shard.total(x, op)

    def sweep(self, *asked: Any) -> None:
        """A pass over a matrix that fills what it is given, see `ByBlocks.sweep`."""
        self.passes.sweep(*asked)

    def parts(self, *asked: Any, **more: Any) -> Tensor:
        """A pass over a matrix that finds numbers, see `ByBlocks.parts`."""
        return self.passes.parts(*asked, **more)

    def seen(self, x: Blocks) -> Blocks:
        """A matrix for products, see `ByBlocks.seen`."""
        return self.passes.seen(x)

    def peak(self, x: Blocks) -> Tensor:
        """The largest magnitude over the shards of the tensor, 0-D; 0 where there are no elements."""
        if not x.shape[0] * x.shape[1]:
            return self.total(torch.zeros((), device=x.device), "max")
        return self.total(self.parts(_largest, x, dtype=torch.float32).amax(), "max")

    def gaussian(self, shape: tuple[int, int], use: str, gap: int = 1) -> Tensor:
        """A standard normal matrix named by (seed, window of `gap` steps or 0 for all, parameter, use)."""
        device = self.weight.device
        drawn = torch.empty(shape, device=device)
        keys = self._normal_keys(use, gap)
        self.sweep(noise.normal_, None, (drawn, noise.starts(shape, device)), (keys,))
        return drawn

    def _normal_keys(self, use: str, gap: int) -> Tensor:
        asked = (self.name, use, gap)
        if sizes(self.weight.device).at_hand or not self.group:
            names = noise.radius_and_angle(self.seed, self.window(gap), self.name, use)
            return noise.key_tensor(names, self.weight.device)
        again = functools.partial(_normal_of, self.group, *asked)
        contents = (self.seed, self.window(gap), self.name, use)
        return self._sent(contents, _normal_words, ("normal", *asked), again).view(2, 2)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax()


def _rates_of(group: Mapping[str, Any], scale: float, coded: str) -> Contents:
    """What `Hyper.rates` will be made of, as the group is now."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    return lr * scale, 1.0 - lr * weight_decay, coded


def _float_words(contents: Contents) -> tuple[int, ...]:
    """Two numbers as they lie in memory."""
    lr, decay, coded = contents
    bits = struct.pack(f"=2{coded}", lr, decay)
    return struct.unpack(f"={len(bits) // 4}i", bits)


def _keys_of(group: Mapping[str, Any], name: str, streams: tuple[str, ...], upper: int) -> Contents:
    """What `Hyper.keys` will be made of, as the group is now."""
    return int(group["seed"]), int(group["step"]), name, streams, upper


def _key_words(contents: Contents) -> tuple[int, ...]:
    seed, step, name, streams, upper = contents
    mixed = (noise.mix(seed, step, name, stream, upper) for stream in streams)  # type: ignore[attr-defined,arg-type]
    return tuple(word for words in mixed for word in words)


def _normal_of(group: Mapping[str, Any], name: str, use: str, gap: int) -> Contents:
    """What the keys of normal numbers will be made of, as the group is now."""
    return int(group["seed"]), _window(int(group["step"]), name, gap), name, use


def _window(step: int, name: str, gap: int) -> int:
    return (step + stagger(name, gap)) // gap if gap else 0


def _normal_words(contents: Contents) -> tuple[int, ...]:
    names = noise.radius_and_angle(*contents)  # type: ignore[arg-type]
    return tuple(word for name in names for word in noise.mix(*name))


@dataclass
class ChunkHyper:
    """What a pointwise rule and a writer may know inside the kernel of one chunk.

    Args:
        scalars: fp32, what `Pointwise.scalars` gave.
        lr, decay: 0-D fp32.
        ok: 0-D bool; False where no part of the tensor's step is taken, and its state must stay.
        finite: bool, per element: False where the step must not be taken.
        position: (rows, width) int32 global element indices, for rules and writers that ask for them.
        keys: (streams, 2) int32; `streams` names its rows.
        weight: the chunk's weight before the step, fp32, for a rule that reads it.
        keeps: the new state is asked for; measures: so are the sums of a rule that `measures`.
    """

    scalars: Tensor
    lr: Tensor
    decay: Tensor
    ok: Tensor
    finite: Tensor
    position: Tensor
    keys: Tensor
    streams: tuple[str, ...]
    weight: Tensor | None = None
    keeps: bool = True
    measures: bool = False

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """New where the gradient was finite, old elsewhere (in fp32, before encoding)."""
        return torch.where(self.finite, new, old)

    def keep_whole(self, new: Tensor, old: Tensor) -> Tensor:
        """New where the tensor's step is taken, whatever some elements are."""
        return torch.where(self.ok, new, old)

    def noise(self, use: str) -> Tensor:
        """32 random bits for each element, from the stream of this use."""
        return noise.bits(self.position, self.keys[self.streams.index(use)])
