"""Pointwise rules with one moment, for rules that need the whole tensor to combine.

A rule that reduces over a tensor still does its element-wise work through the
frame: it hands one of these to `Hyper.advance`, or lets its `Direction` end in
one. What is held lies under the rule's own name in the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.codecs import Codec
from lowmem.optim.contract import Change, ChunkHyper, Hyper, State, at_hand, part, prefixed
from lowmem.optim.factored import TINY


def _under(scope: str, numbers: Mapping[str, int]) -> Mapping[str, int]:
    return {f"{scope}.{key}" if key else scope: value for key, value in numbers.items()}


@dataclass(frozen=True)
class Square:
    """The full second moment of a vector, and the gradient divided by its root.

    v <- v + t^decay_rate (g^2 + eps - v),  d = g / sqrt(v)

    Args:
        codec: how v is held.
        decay_rate: exponent of the average, below 0.
        eps: added to g^2.
    """

    codec: Codec
    decay_rate: float = -0.8
    eps: float = 1e-30
    compilable: bool = False  # vectors are few and short

    @property
    def grain(self) -> int:
        """A block of the codec."""
        return self.codec.grain

    @property
    def per(self) -> Mapping[str, int]:
        """The codec's tensors are cut; the age is not."""
        return _under("square", self.codec.per)

    @property
    def fill(self) -> Mapping[str, int]:
        """What the codec pads with."""
        return _under("square", self.codec.fill)

    @property
    def streams(self) -> tuple[str, ...]:
        """Those of the codec."""
        return self.codec.streams

    def init(self, x: Tensor) -> State:
        """A moment of zero."""
        return prefixed("square", self.codec.init(x))

    def shared(self, x: Tensor) -> State:
        """The codec's tables."""
        return self.codec.shared(x)

    def rate(self, s: State, hp: Hyper) -> Tensor:
        """How far the average moves, t^decay_rate: all the way at the first step; 0-D fp32."""
        if (t := at_hand(s["age"])) is not None:
            return hp.vector(max(t, 1) ** self.decay_rate, dtype=torch.float32)[0]
        return (s["age"].double() ** self.decay_rate).float()

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """The rate and eps."""
        return torch.stack((self.rate(s, hp), hp.vector(self.eps, dtype=torch.float32)[0]))

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The equations above, on one chunk."""
        rate, eps = hp.scalars.unbind()
        old = self.codec.decode(part(s, "square"), s)
        v = hp.keep(old + rate * (g * g + eps - old), old)
        return g * v.clamp(min=TINY).rsqrt(), prefixed("square", self.codec.encode(v, hp, s))

    def moments(self, s: State) -> State:
        """The moment, flat fp32."""
        return {"square": self.codec.decode(part(s, "square"), s)}

    def check_rebase(self, kind: str) -> None:
        """Vectors are not projected."""

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Vectors are not projected."""


@dataclass(frozen=True)
class Momentum:
    """An average of steps, with the step size inside: m <- m + (1 - beta)(rate u - m), d = m.

    Args:
        codec: how m is held.
        beta: share of the old m, in (0, 1).
    """

    codec: Codec
    beta: float
    compilable: bool = True

    @property
    def grain(self) -> int:
        """A block of the codec."""
        return self.codec.grain

    @property
    def per(self) -> Mapping[str, int]:
        """The codec's tensors are cut; the rate is not."""
        return _under("momentum", self.codec.per)

    @property
    def fill(self) -> Mapping[str, int]:
        """What the codec pads with."""
        return _under("momentum", self.codec.fill)

    @property
    def streams(self) -> tuple[str, ...]:
        """Those of the codec."""
        return self.codec.streams

    def init(self, x: Tensor) -> State:
        """An average of zero."""
        return prefixed("momentum", self.codec.init(x))

    def shared(self, x: Tensor) -> State:
        """The codec's tables."""
        return self.codec.shared(x)

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """1 - beta, and the step size that the rule has found."""
        return torch.stack((hp.vector(1.0 - self.beta)[0], s["rate"])).float()

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The equation above, on one chunk."""
        move, rate = hp.scalars.unbind()
        old = self.codec.decode(part(s, "momentum"), s)
        m = hp.keep(old + move * (rate * g - old), old)
        return m, prefixed("momentum", self.codec.encode(m, hp, s))

    def moments(self, s: State) -> State:
        """The average, flat fp32."""
        return {"momentum": self.codec.decode(part(s, "momentum"), s)}

    def check_rebase(self, kind: str) -> None:
        """Asked of the whole rule."""

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Done by the whole rule."""
