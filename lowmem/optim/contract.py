"""The contract between the frame and the methods.

There are two kinds of rule, because two things cannot be one:

* A `Pointwise` rule treats each block of `grain` elements alone (Adam over
  block-wise codecs, Lion, SGD, MicroAdam). Its step is a pure function of a flat
  chunk: the frame cuts, pads, guards, writes and stores, and compiles the
  function together with the writer.
* A `Rule` needs the whole tensor (a subspace, a factored moment): it looks at
  gradients as `Blocks`, keeps its state up to date itself, and returns a
  `Direction` that the frame writes.

State is a flat dict of plain tensors. Keys, shapes and dtypes are fixed by
`init`, which looks at shape, dtype and device alone, so that it runs on the
meta device: the code that allocates is the code that counts.

There are two clocks. `Hyper.step` is a host integer and decides schedules;
`age`, a 0-D state tensor, counts the steps that the moments have seen and
decides bias correction: a skipped step does not age, a reset sets it to 0.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.engine import noise
from lowmem.optim.engine.cutting import LADDER

State = dict[str, Tensor]


class Held(State):
    """A state whose tensors are neither replaced nor given other storage: what is derived is kept with it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.parts: dict[str, Held] = {}
        self.layouts: dict[tuple[int, int, bool], Any] = {}


def scoped(state: Mapping[str, Tensor], scope: str) -> State:
    """The part of a state under a dotted prefix, without it.

    >>> sorted(scoped({"inner.age": torch.zeros(()), "basis": torch.zeros(2)}, "inner"))
    ['age']
    """
    parts = state.parts if isinstance(state, Held) else {}
    if scope not in parts:
        head = f"{scope}."
        parts[scope] = Held({k[len(head) :]: value for k, value in state.items() if k.startswith(head)})
    return parts[scope]


def prefixed(scope: str, state: Mapping[str, Tensor]) -> State:
    """A state put under a dotted prefix; an empty key becomes the prefix itself."""
    return {f"{scope}.{key}" if key else scope: value for key, value in state.items()}


def part(state: Mapping[str, Tensor], name: str) -> State:
    """What a codec holds of one moment: the inverse of `prefixed`."""
    return {"": state[name]} if name in state else scoped(state, name)


def at_hand(age: Tensor) -> int | None:
    """An age as a number where reading it waits for nothing, on the CPU; None elsewhere."""
    return int(age) if age.device.type == "cpu" else None


@functools.lru_cache(1 << 16)
def stagger(name: str, gap: int) -> int:
    """The offset of a parameter's refreshes within the gap, from its name.

    >>> 0 <= stagger("layers.0.q_proj.weight", 200) < 200
    True
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % gap


@dataclass(frozen=True)
class Keep:
    """A basis change that leaves the moments as they are."""


@dataclass(frozen=True)
class Reset:
    """A basis change that makes the moments meaningless: start afresh, with age 0.

    Args:
        ok: 0-D bool; False (no new basis was found) leaves them.
    """

    ok: Tensor


@dataclass(frozen=True)
class Rotate:
    """A basis change low_new = C low_old along one axis of the projected matrix.

    Args:
        matrix: C, (r_new, r_old) fp32; maps coordinates in the old basis to the new one.
        axis: 0 where the projected gradient is (r, n), 1 where it is (m, r).
    """

    matrix: Tensor
    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        """C x along the axis."""
        return self.along(self.matrix, x)

    def squares(self, x: Tensor) -> Tensor:
        """(C o C) x along the axis: what becomes of variances of independent coordinates."""
        return self.along(self.matrix.square(), x)

    def along(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix applied to the axis of the basis."""
        return matrix @ x if self.axis == 0 else x @ matrix.t()


Change = Keep | Reset | Rotate


class Lookup:
    """Small constant tensors, made once for each value and device."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}
        self.tables: dict[Hashable, Any] = {}

    def __call__(
        self, values: tuple[float, ...], dtype: torch.dtype, device: torch.device, times: int = 1
    ) -> Tensor:
        """The values, so many times, as a 1-D tensor; not to be written to."""
        key = (values, dtype, device, times)
        if key not in self._made:
            if len(self._made) > 4096:
                self._made.clear()
            made = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
            self._made[key] = made if times == 1 else made.repeat(times)
        return self._made[key]


class Advance(Protocol):
    """`Chunks.advance_`: a pointwise rule's step on a matrix that a rule has made."""

    def __call__(
        self, rule: Pointwise, low: Tensor, s: State, hp: Hyper, ok: Tensor | None = None
    ) -> Tensor: ...


@dataclass
class Hyper:
    """What a rule may know of the step it takes.

    Args:
        step: completed steps of the group before this one (host clock, for schedules).
        name: the parameter's name; with `seed` it names every random stream.
        seed: the run's seed.
        lr, betas, eps, weight_decay: of the group, as floats.
        weight: the weight before the step, (m, n).
        shape: the full tensor's shape; `offset` is the first element held here.
        first: the state was created for this step.
        advance: the frame's `Chunks.advance_`, for rules that hold a pointwise rule.
        constant: cache of small tensors.
    """

    step: int
    name: str
    seed: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    weight: Blocks
    shape: tuple[int, ...]
    advance: Advance
    offset: int = 0
    first: bool = False
    constant: Lookup = field(default_factory=Lookup)

    @property
    def decay(self) -> float:
        """The factor of decoupled weight decay, 1 - lr weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    def vector(self, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Floats as a cached 1-D tensor on the weight's device."""
        return self.constant(values, dtype, self.weight.device)

    def filled(self, count: int, value: float) -> Tensor:
        """A vector of one value, cached, fp32; not to be written to."""
        return self.constant((value,), torch.float32, self.weight.device, count)

    @property
    def share(self) -> float:
        """The part of the tensor that is held here; one device holds it all today."""
        return 1.0

    def due(self, gap: int) -> bool:
        """Whether a refresh with this gap falls on this step: at first, then staggered by name."""
        return self.first or self.step == 0 or (self.step + stagger(self.name, gap)) % gap == 0

    def total(self, x: Tensor, op: str = "sum") -> Tensor:
        """Reduce over the shards of the tensor ("sum" or "max"); one device holds it all today."""
        if op not in ("sum", "max"):
            raise ValueError(f"total over shards: op is 'sum' or 'max', got {op!r}")
        return x

    def gaussian(self, shape: tuple[int, int], use: str) -> Tensor:
        """A standard normal matrix named by (seed, step, parameter, use)."""
        return noise.gaussian(shape, self.weight.device, self.seed, self.step, self.name, use)


@dataclass
class ChunkHyper:
    """What a pointwise rule and a writer may know inside the kernel of one chunk.

    Args:
        scalars: 1-D fp32, what `Pointwise.scalars` gave.
        lr, decay: 0-D fp32.
        ok: 0-D bool; False where no part of the tensor's step is taken, and its state must stay.
        finite: bool, per element: False where the step must not be taken.
        position: (rows, width) int32 global element indices.
        keys: (streams, 2) int32; `streams` names its rows.
        weight: the chunk's weight before the step, fp32, for a rule that reads it.
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

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """New where the gradient was finite, old elsewhere (in fp32, before encoding)."""
        return torch.where(self.finite, new, old)

    def noise(self, use: str) -> Tensor:
        """32 random bits for each element, from the stream of this use."""
        return noise.bits(self.position, self.keys[self.streams.index(use)])


class Pointwise:
    """A rule that treats each block of `grain` elements alone.

    Attributes:
        grain: elements of a block; chunks are multiples of it.
        per: elements for each entry of a state tensor along dim 0; tensors left out are seen whole.
        fill: what an entry that pads a state tensor holds, where that is not 0.
        streams: names of the random streams that `step` uses.
        compilable: whether compiling the step pays.
        reads_weight: `ChunkHyper.weight` must be there, so that the rule cannot step inside another.
        chunk: the most elements (a multiple of `grain`) that an eager step should see at once:
            its own scratch decides when a chunk leaves the cache.
    """

    @property
    def grain(self) -> int:
        """Any number of elements."""
        return 1

    @property
    def per(self) -> Mapping[str, int]:
        """Nothing is cut."""
        return {}

    @property
    def fill(self) -> Mapping[str, int]:
        """Zero is zero."""
        return {}

    @property
    def streams(self) -> tuple[str, ...]:
        """Nothing is drawn."""
        return ()

    @property
    def compilable(self) -> bool:
        """Most rules fuse."""
        return True

    @property
    def reads_weight(self) -> bool:
        """Most rules do not."""
        return False

    @property
    def chunk(self) -> int:
        """As many as fit the cache with a few temporaries."""
        return LADDER[0]

    def init(self, x: Tensor) -> State:
        """Fresh state for a tensor like x; nothing."""
        return {}

    def shared(self, x: Tensor) -> State:
        """Constants that one optimizer holds once for each key; none."""
        return {}

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """The fp32 numbers that the step needs, 1-D, once for each tensor; none."""
        return hp.vector(0.0, dtype=torch.float32)

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """Pure: fp32 gradient chunk to fp32 direction and the new state of the chunk.

        A chunk is (rows, width), a row being one block of `grain` elements or, where that is 1, any
        number of them. A state tensor of one dimension comes as (rows, width / per), another as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no step")

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Carry the state of a projected (r, n) or (m, r) matrix over a basis change."""

    def check_rebase(self, kind: str) -> None:
        """Raise where keep, reset or rotate is not defined for what is held."""


@runtime_checkable
class Rule(Protocol):
    """A rule that needs the whole tensor."""

    def init(self, x: Tensor) -> State:
        """Fresh state for a tensor like x."""

    def shared(self, x: Tensor) -> State:
        """Constants that one optimizer holds once for each key."""

    def prepare(self, g: Blocks, s: State, hp: Hyper) -> None:
        """What is rare, such as a refresh; branches on `hp.step` alone."""

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Every step: update the state, give the step to be taken."""

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Carry the state of a projected matrix over a basis change."""

    def check_rebase(self, kind: str) -> None:
        """Raise where keep, reset or rotate is not defined for what is held."""


AnyRule = Pointwise | Rule


def is_pointwise(rule: AnyRule) -> TypeGuard[Pointwise]:
    """Which of the two kinds a rule is."""
    return isinstance(rule, Pointwise)


def apply_in_place(state: State, new: State) -> None:
    """Store new values under the same keys, into the same memory."""
    for key, value in new.items():
        state[key].copy_(value)


def reset_(state: State, fresh: State, change: Reset) -> None:
    """Put a state back to what init gives, in place (zeros are not always code 0).

    Args:
        state: of any size.
        fresh: what init gives for a tensor of one element: each fresh tensor has one value throughout.
        change: where it is not ok, nothing happens.
    """
    for key, value in fresh.items():
        state[key].masked_fill_(change.ok, value.view(-1)[0])
