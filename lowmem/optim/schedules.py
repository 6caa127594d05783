"""Which rule a tensor follows now.

A schedule is a pure function of the step and of the names, so a resumed run
needs nothing from it. Where the role of a tensor changes, its state is dropped
and made anew: block-wise methods hold state for the active tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lowmem.errors import UserError
from lowmem.optim.engine import noise


class Schedule(Protocol):
    """Which rule a tensor follows at a step."""

    def role(self, name: str, role: str, names: Sequence[str], step: int, seed: int) -> str:
        """The key of the rule for one tensor.

        Args:
            name: of the tensor; role: its ordinary role.
            names: of all tensors with that role.
            step: completed steps; seed: of the run.
        """

    def switches(self, step: int) -> bool:
        """Whether roles may change at this step, and state is made anew."""

    def began(self, step: int) -> int:
        """The step at which the roles of this one were given out; who joins later takes part in the next."""


@dataclass(frozen=True)
class Always:
    """Every tensor follows its ordinary rule."""

    def role(self, name: str, role: str, names: Sequence[str], step: int, seed: int) -> str:
        """The ordinary role."""
        return role

    def switches(self, step: int) -> bool:
        """Never."""
        return False

    def began(self, step: int) -> int:
        """At once."""
        return step


@dataclass(frozen=True)
class RandomBlocks:
    """round(density k) of the k matrices are active for `gap` steps, the rest follow "inactive".

    The matrices are taken in a random order, a new one for each sweep, so that every
    one has its turn (FRUGAL's block split, arXiv 2411.07837).

    Which tensors hold state therefore depends on the step. torch.distributed.checkpoint loads into
    what an optimizer holds already: for a checkpoint of k steps set `step` of every group to k - 1
    and call `init_state()` first.

    Args:
        density: fraction of the matrices, by number.
        gap: steps between changes.
    """

    density: float
    gap: int = 200

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0 or self.gap < 1:
            raise UserError(
                f"density must be in (0, 1] and update_proj_gap >= 1, got {self.density}, {self.gap}"
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

    def began(self, step: int) -> int:
        """The last change of the active set."""
        return step - step % self.gap


@functools.lru_cache(maxsize=32)
def _window(names: tuple[str, ...], density: float, window: int, seed: int) -> frozenset[str]:
    """The active names of one window; the last window of a sweep is filled up from the sweep's beginning."""
    count = max(1, round(density * len(names)))
    sweep, place = divmod(window, -(-len(names) // count))
    order = sorted(names, key=lambda name: (noise.mix(seed, sweep, name, "block"), name))
    return frozenset((order + order)[place * count : (place + 1) * count])
