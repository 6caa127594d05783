"""Which rule a tensor follows now.

A schedule is a pure function of the step and of the names, so a resumed run
needs nothing from it. Where the role of a tensor changes, its state is dropped
and made anew: block-wise methods hold state for the active tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.errors import UserError, nearest
from lowmem.optim.engine import noise


class Schedule:
    """Which rule a tensor follows at a step; by default, always its ordinary one."""

    def role(self, name: str, role: str, names: Sequence[str], step: int, seed: int) -> str:
        """The key of the rule for one tensor.

        Args:
            name: of the tensor; role: its ordinary role.
            names: of all tensors with that role.
            step: completed steps; seed: of the run.
        """
        return role

    @property
    def rests(self) -> bool:
        """Whether what is divided is put aside for good."""
        return False

    def switches(self, step: int) -> bool:
        """Whether roles may change at this step."""
        return False

    def moves(self, role: str) -> bool:
        """Whether tensors of an ordinary role are divided, so that their state is made anew at a switch."""
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

    Which tensors hold state therefore depends on the step. torch.distributed.checkpoint loads into
    what an optimizer holds already: for a checkpoint of k steps set `step` of every group to k - 1
    and call `init_state()` first.

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

    def role(self, name: str, role: str, names: Sequence[str], step: int, seed: int) -> str:
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

    def moves(self, role: str) -> bool:
        """Matrices alone."""
        return role == "matrix"

    @property
    def rests(self) -> bool:
        """Where there is no density."""
        return self.density == 0.0

    def began(self, step: int) -> int:
        """The last change of the active set."""
        return step - step % self.gap


ORDERS = ("random", "ascending", "descending")


@dataclass(frozen=True)
class Layers(Schedule):
    """One layer at a time (BAdam, arXiv 2404.02827): its tensors are active for `gap` steps, all others rest.

    A layer is what shares the first number in a name: model.layers.7.mlp.weight is of layer 7. Tensors
    without a number (embedding, head, last norm) rest throughout.

    Args:
        gap: steps of a layer, at least 1.
        order: random (every layer once in a sweep, a new order for each), ascending or descending.

    Raises:
        UserError: a number or word outside its range; at the first step, a model without numbered layers.
    """

    gap: int = 50
    order: str = "random"

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise UserError(f"update_proj_gap must be at least 1, got {self.gap}")
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}; {nearest(self.order, ORDERS)}")

    def role(self, name: str, role: str, names: Sequence[str], step: int, seed: int) -> str:
        """The ordinary role while the layer is active, "inactive" otherwise."""
        layers = _layers(tuple(names))
        if not layers and role == "matrix":
            raise UserError(f"{name!r} is in no numbered layer; take a schedule that does not go by layers")
        return role if layers and _layer(name) == self.active(layers, step, seed) else "inactive"

    def active(self, layers: Sequence[int], step: int, seed: int) -> int:
        """The layer that is active at a step."""
        sweep, place = divmod(step // self.gap, len(layers))
        if self.order == "random":
            order = sorted(layers, key=lambda layer: (noise.mix(seed, sweep, layer, "layer"), layer))
        else:
            order = sorted(layers, reverse=self.order == "descending")
        return order[place]

    def switches(self, step: int) -> bool:
        """At every change of the layer."""
        return step % self.gap == 0

    def moves(self, role: str) -> bool:
        """All tensors: those without a layer rest."""
        return True

    def began(self, step: int) -> int:
        """The last change of the layer."""
        return step - step % self.gap


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
