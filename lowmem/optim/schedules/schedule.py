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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.formulas import ByBlocks
from lowmem.optim.terms.state import State


class Schedule:
    """Which rule a tensor follows at a step; by default, always its ordinary one.

    Attributes:
        observes: it goes by what gradients were: `observe_` sees each, `decide` is asked at every switch.
        steady: every tensor always follows its ordinary rule.
        by_layer: a layer has its turn as a whole, whatever rules its tensors follow: names say which.
    """

    observes: ClassVar[bool] = False
    steady: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False

    def role(
        self, name: str, role: str, names: Sequence[str], step: int, seed: int, decided: str = ""
    ) -> str:
        """The key of the rule for one tensor.

        Args:
            name: of the tensor; role: its ordinary role.
            names: of all tensors with that role, or of all where turns go by layers.
            step: completed steps; seed: of the run.
            decided: what `decide` gave last; empty before.
        """
        return role

    def init(self, rule_name: str, x: Tensor) -> State:
        """What is held of a tensor like x that follows a rule; nothing."""
        return {}

    def part(self, g: Blocks, passes: ByBlocks) -> Tensor:
        """What the rows of a gradient that are here add to what is observed, 0-D: it is summed over ranks."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def observe_(self, s: State, part: Tensor, shape: tuple[int, int]) -> None:
        """Take in a gradient of a tensor of which something is held: its summed `part`, and its shape."""

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

    steady: ClassVar[bool] = True
