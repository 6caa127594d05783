"""Schedules by the calendar: which matrices or layers are active follows from seed, step and names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowmem.errors import UserError, nearest
from lowmem.optim.engine import noise
from lowmem.optim.schedules.schedule import Schedule


@dataclass(frozen=True)
class RandomBlocks(Schedule):
    """round(density k) of the k matrices are active for `gap` steps, the rest follow "inactive".

    The matrices are taken in a random order, a new one for each sweep, so that every
    one has its turn (FRUGAL's block split, arXiv 2411.07837).

    Args:
        density: fraction of the matrices, by number; with 0 none is ever active.
        gap: steps between changes.
    """

    density: float
    gap: int = 200

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0 or self.gap < 1:
            raise UserError(
                f"density must be in [0, 1] and the gap at least 1, got {self.density}, {self.gap}"
            )

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """The role "matrix" while active, "inactive" otherwise."""
        if role != "matrix" or name in self.active(names, step, seed):
            return role
        return "inactive"

    def active(self, names: Sequence[str], step: int, seed: int) -> frozenset[str]:
        """The matrices that are active at a step."""
        return _window(tuple(names), self.density, step // self.gap, seed)

    def switches(self, step: int) -> bool:
        """At every change of the active set."""
        return step % self.gap == 0

    def restarts(self, name: str, role: str) -> bool:
        """Matrices alone."""
        return role == "matrix"

    @property
    def rests(self) -> bool:
        """Where there is no density."""
        return self.density == 0.0

    def began(self, step: int) -> int:
        """The last change of the active set."""
        return step - step % self.gap


ORDERS = ("random", "ascending", "descending", "drawn")


@dataclass(frozen=True)
class Layers(Schedule):
    """Some layers at a time: their tensors are active for `gap` steps, all others rest.

    One layer after the other is BAdam (arXiv 2404.02827), a few that are drawn, with what is of no layer
    always active, LISA (arXiv 2403.17919). A layer is what shares the first number in a name:
    model.layers.7.mlp.weight is of layer 7. Which layers are active follows from seed, step and names.

    Args:
        gap: steps of a layer, at least 1.
        order: random (every layer once in a sweep, a new order for each), ascending, descending, or drawn
            (anew each time, whatever was before).
        count: layers at a time, at least 1.
        ends: what is of no layer (embedding, head, last norm) is active throughout; if not, it rests.

    Raises:
        UserError: a number or word outside its range; at the first step, a model without numbered layers.

    Example:
        >>> [sorted(Layers(5, "ascending").active((0, 1), step, seed=0)) for step in (0, 4, 5, 10)]
        [[0], [0], [1], [0]]
    """

    by_layer: ClassVar[bool] = True
    gap: int = 50
    order: str = "random"
    count: int = 1
    ends: bool = False

    def __post_init__(self) -> None:
        if self.gap < 1 or self.count < 1:
            raise UserError(
                f"switch_gap and layers must be at least 1, got switch_gap={self.gap}, layers={self.count}"
            )
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}; {nearest(self.order, ORDERS)}")

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """The ordinary role while the layer is active, "inactive" otherwise."""
        layers, own = _layers(tuple(names)), _layer(name)
        if not layers and role == "matrix":
            raise UserError(f"{name!r} is in no numbered layer; take a schedule that does not go by layers")
        active = self.ends if own is None else own in self.active(layers, step, seed)
        return role if active else "inactive"

    def active(self, layers: tuple[int, ...], step: int, seed: int) -> frozenset[int]:
        """The layers that are active at a step."""
        return _turn(layers, self.count, self.order, step // self.gap, seed)

    def switches(self, step: int) -> bool:
        """At every change of the layers."""
        return step % self.gap == 0

    def restarts(self, name: str, role: str) -> bool:
        """All that takes turns."""
        return not self.ends or _layer(name) is not None

    def began(self, step: int) -> int:
        """The last change of the layers."""
        return step - step % self.gap


@functools.lru_cache(maxsize=64)
def _turn(layers: tuple[int, ...], count: int, order: str, window: int, seed: int) -> frozenset[int]:
    """The layers of one window; the last window of a sweep is filled up from the sweep's beginning."""
    sweep, place = divmod(window, max(1, -(-len(layers) // count)))
    if order == "drawn":
        sweep, place = window, 0
    if order in ("random", "drawn"):
        turns = sorted(layers, key=lambda layer: (noise.mix(seed, sweep, layer, "layer"), layer))
    else:
        turns = sorted(layers, reverse=order == "descending")
    return frozenset((turns + turns)[place * count : (place + 1) * count])


def _layer(name: str) -> int | None:
    """The first number among the parts of a name."""
    return next((int(word) for word in name.split(".") if word.isdecimal()), None)


@functools.lru_cache(maxsize=32)
def _layers(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted({layer for layer in map(_layer, names) if layer is not None}))


@functools.lru_cache(maxsize=32)
def _window(names: tuple[str, ...], density: float, window: int, seed: int) -> frozenset[str]:
    """The active names of one window; the last window of a sweep is filled up from the sweep's beginning."""
    if not density or not names:
        return frozenset()
    count = max(1, round(density * len(names)))
    sweep, place = divmod(window, -(-len(names) // count))
    order = sorted(names, key=lambda name: (noise.mix(seed, sweep, name, "block"), name))
    return frozenset((order + order)[place * count : (place + 1) * count])
