"""Schedules that go by what gradients were: which tensors are worth a step.

While a tensor is active, the size of each of its gradients is summed up in its state. At a
switch the means are read, once for all tensors, and a schedule decides. What it decided
is a line of plain text in the parameter groups: from it, step and names follow the roles,
before the switch as after it, so a checkpoint resumes at either. A tensor that stays
active keeps its state.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.engine import noise
from lowmem.optim.formulas import ByBlocks
from lowmem.optim.schedules.schedule import Schedule
from lowmem.optim.shards import whole
from lowmem.optim.terms.state import State

BY = ("change", "size")
SMOOTHING = 0.8
"""Share of the old average of norms."""
MOST = 5.0
"""The largest exponent of a chance."""


@dataclass(frozen=True)
class Watching(Schedule):
    """What such schedules share: matrices are watched, and what was decided is read as JSON.

    Holds 16 bytes for an active matrix.

    Args:
        gap: steps between decisions, at least 1.
    """

    gap: int = 50
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise UserError(f"switch_gap must be at least 1, got {self.gap}")

    def init(self, rule_name: str, x: Tensor) -> State:
        """The sum of sizes, and of how many gradients."""
        watched = rule_name == "matrix"
        return {"seen": torch.zeros(2, dtype=torch.float64, device=x.device)} if watched else {}

    def observe_(self, s: State, part: Tensor, shape: tuple[int, int]) -> None:
        """One gradient more; one that is not finite says nothing."""
        size = self.size(part, shape)
        both = torch.stack((size, torch.ones_like(size)))
        s["seen"].add_(torch.where(size.isfinite(), both, 0.0))

    def size(self, part: Tensor, shape: tuple[int, int]) -> Tensor:
        """What is averaged of a gradient of this shape, by its summed `part`, 0-D fp64."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def switches(self, step: int) -> bool:
        """At every decision."""
        return step % self.gap == 0

    def began(self, step: int) -> int:
        """The last decision."""
        return step - step % self.gap


def _sizes(rows: Tensor) -> Tensor:
    return rows.abs().sum(dtype=torch.float64)


def _squares(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()


@functools.lru_cache(maxsize=16)
def _read(decided: str) -> Any:
    """What was decided; not to be written to."""
    return json.loads(decided)


@dataclass(frozen=True)
class Converged(Watching):
    """Freeze a matrix for good once its gradients have settled (GradES, arXiv 2509.01842).

        s_w = mean over a window of mean |G|;  frozen where |s_w - s_(w-1)| < threshold, or s_w < threshold

    A frozen matrix holds no state and no gradient is made for it. Means are over elements, so that one
    threshold suits all sizes, and nothing of a gradient is kept: published code holds a copy of every
    weight and goes by how that changed. The last matrix is never frozen.

    Args:
        threshold: above 0; grace: steps before anything is frozen, at least 0.
        by: change or size.

    Raises:
        UserError: a number or word outside its range.
    """

    gap: int = 100
    threshold: float = 1e-6
    grace: int = 1000
    by: str = "change"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0.0 or self.grace < 0:
            raise UserError(
                f"threshold must be above 0 and grace at least 0, got {self.threshold}, {self.grace}"
            )
        if self.by not in BY:
            raise UserError(f"unknown by {self.by!r}; {nearest(self.by, BY)}")

    def part(self, g: Blocks, passes: ByBlocks) -> Tensor:
        """The sum of sizes."""
        return passes.parts(_sizes, g).sum(0)

    def size(self, part: Tensor, shape: tuple[int, int]) -> Tensor:
        """The mean size of an element."""
        return part / math.prod(whole(shape))

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """From the step on at which a matrix was frozen, "inactive"."""
        if role != "matrix" or not decided:
            return role
        return "inactive" if _read(decided)["frozen"].get(name, math.inf) <= step else role

    def decide(
        self, decided: str, seen: Mapping[str, float], names: Sequence[str], step: int, seed: int
    ) -> str:
        """Freeze those that have settled, the one that moves most excepted if it were the last."""
        before = _read(decided) if decided else {"frozen": {}, "size": {}}
        moved = {
            name: abs(size - before["size"].get(name, math.inf)) if self.by == "change" else size
            for name, size in seen.items()
        }
        settled = [name for name, by in moved.items() if by < self.threshold and step >= self.grace]
        frozen = {**before["frozen"], **dict.fromkeys(settled, step)}
        if settled and frozen.keys() >= set(names):
            del frozen[max(settled, key=lambda name: (moved[name], name))]
        return json.dumps({"frozen": frozen, "size": dict(seen)}, sort_keys=True)


@dataclass(frozen=True)
class Important(Watching):
    """Some matrices at a time, those more often whose gradients are larger (MISA, arXiv 2511.00056).

        at a switch: those that never had a turn, in a random order; then by lot without replacement,
        with chances in proportion to exp(min(5, eta g^2)), g the smoothed norm of a matrix' gradients

    What has a turn again keeps its state. What is no matrix rests, unless `ends`. The share is one of the
    number of matrices. In the released code the set changes at every step until all had a turn, and
    the average of norms is corrected for its beginning again and again.

    Args:
        share: of the matrices that are active, in (0, 1].
        eta: how much larger gradients count, at least 0; 0 draws evenly.
        ends: what is no matrix is active throughout.

    Raises:
        UserError: a number outside its range.
    """

    share: float = 0.03
    eta: float = 1.0
    ends: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.share <= 1.0 or not self.eta >= 0.0:
            raise UserError(
                f"share must be in (0, 1] and eta at least 0, got share={self.share}, eta={self.eta}"
            )

    def part(self, g: Blocks, passes: ByBlocks) -> Tensor:
        """The sum of squares."""
        return passes.parts(_squares, g).sum(0)

    def size(self, part: Tensor, shape: tuple[int, int]) -> Tensor:
        """The norm."""
        return part.sqrt()

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """The ordinary role while it is its turn, "inactive" otherwise."""
        if role != "matrix":
            return role if self.ends else "inactive"
        if not decided:
            return role if name in _first(self, tuple(names), seed) else "inactive"
        found = _read(decided)
        return role if name in found["now" if step >= found["since"] else "before"] else "inactive"

    def decide(
        self, decided: str, seen: Mapping[str, float], names: Sequence[str], step: int, seed: int
    ) -> str:
        """Take in what was seen, and draw the next turn."""
        old = _read(decided) if decided else {"mean": {}, "times": {}}
        now = old["now"] if decided else sorted(_first(self, tuple(names), seed))
        mean, times = dict(old["mean"]), dict(old["times"])
        for name in now:
            times[name] = times.get(name, 0) + 1
            if name in seen:
                mean[name] = SMOOTHING * mean.get(name, 0.0) + (1.0 - SMOOTHING) * seen[name]
        turn = self.turn(mean, times, names, step, seed)
        found = {"since": step, "before": now, "now": sorted(turn), "mean": mean, "times": times}
        return json.dumps(found, sort_keys=True)

    def turn(
        self, mean: Mapping[str, float], times: Mapping[str, int], names: Sequence[str], step: int, seed: int
    ) -> frozenset[str]:
        """The matrices of the window that begins at a step.

        Args:
            mean: smoothed norms, not yet corrected for their beginning; times: turns that went into them.
        """

        def order(name: str) -> tuple[float, str]:
            draw = (noise.mix(seed, step, name, "turn")[0] & 0xFFFFFFFF) / 2.0**32 + 2.0**-33
            if name not in times:
                return -math.inf, f"{draw:.12f}{name}"
            g = mean.get(name, 0.0) / (1.0 - SMOOTHING ** times[name])
            # the k smallest of -log(u) / weight are k drawn without replacement, in proportion to weight
            return -math.log(draw) / self.weight(g), name

        count = max(1, round(self.share * len(names)))
        return frozenset(sorted(names, key=order)[:count])

    def weight(self, g: float) -> float:
        """In proportion to which a matrix is drawn whose gradients have norm g.

        >>> weights = [Important().weight(g) for g in (0.1, 0.5, 1.0, 2.0)]
        >>> [round(one / sum(weights), 6) for one in weights]
        [0.016944, 0.02154, 0.045601, 0.915915]
        """
        return math.exp(min(MOST, self.eta * g * g))


@functools.lru_cache(maxsize=32)
def _first(schedule: Important, names: tuple[str, ...], seed: int) -> frozenset[str]:
    """The turn before anything was seen, which every tensor asks for."""
    return schedule.turn({}, {}, names, 0, seed)
