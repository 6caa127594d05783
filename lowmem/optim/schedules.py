"""Which rule a tensor follows now.

A schedule is a pure function of the step, of the names and of what it has decided,
which is text in the parameter groups: a resumed run needs nothing else. Where the
role of a tensor changes, its state is dropped and made anew: block-wise methods hold
state for the active tensors alone, and where the rule of the others is `Rest`, no
gradient is made for them either.

torch.distributed.checkpoint loads into what an optimizer holds already, and that
depends on the step: for a checkpoint of k steps set `step` of every group to k - 1
(and `decided` to what was saved) and call `init_state()` first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.engine import noise
from lowmem.optim.state import State


class Schedule:
    """Which rule a tensor follows at a step; by default, always its ordinary one.

    Attributes:
        observes: it goes by what gradients were: `observe_` sees each, `decide` is asked at every switch.
    """

    observes: ClassVar[bool] = False

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """The key of the rule for one tensor.

        Args:
            name: of the tensor; role: its ordinary role.
            names: of all tensors with that role.
            step: completed steps; seed: of the run.
            decided: what `decide` gave last; empty before.
        """
        return role

    def init(self, rule_name: str, x: Tensor) -> State:
        """What is held of a tensor like x that follows a rule; nothing."""
        return {}

    def observe_(self, s: State, g: Blocks) -> None:
        """Take in a gradient of a tensor of which something is held."""

    def decide(
        self, decided: str, seen: Mapping[str, float], names: Sequence[str], step: int, seed: int
    ) -> str:
        """What roles follow from beside step and names; plain text.

        Args:
            decided: what was decided last.
            seen: mean size of the gradients since then, of each tensor that had some.
            names: of all matrices; step: completed ones; seed: of the run.
        """
        return decided

    @property
    def rests(self) -> bool:
        """Whether what is divided is put aside for good."""
        return False

    def switches(self, step: int) -> bool:
        """Whether roles may change at this step."""
        return False

    def restarts(self, name: str, role: str) -> bool:
        """Whether a tensor's state is made anew at a switch even where it follows the same rule as before."""
        return False

    def began(self, step: int) -> int:
        """The step at which the roles of this one were given out; who joins later takes part in the next."""
        return step


@dataclass(frozen=True)
class Always(Schedule):
    """Every tensor follows its ordinary rule."""


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
        return _window(tuple(sorted(names)), self.density, step // self.gap, seed)

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
    if not density:
        return frozenset()
    count = max(1, round(density * len(names)))
    sweep, place = divmod(window, -(-len(names) // count))
    order = sorted(names, key=lambda name: (noise.mix(seed, sweep, name, "block"), name))
    return frozenset((order + order)[place * count : (place + 1) * count])
