"""The contract between the frame and the parts: base classes with defaults, so a part writes what is its own.

What a part needs or forbids is declared on it. It holds nothing itself: state is a flat dict.
There are two kinds of rule, because two things cannot be one:
* A `Pointwise` rule treats each block of `grain` elements alone (element-wise rules over codecs, MicroAdam).
  Its step is a pure function of a flat chunk: the frame cuts, pads, guards, writes, stores and compiles it.
* A `Rule` needs the whole tensor: it reads gradients as `Blocks`, keeps its state, returns a `Direction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.engine.cutting import LADDER
from lowmem.optim.shards import ByRows, Shape
from lowmem.optim.terms.asks import Asks
from lowmem.optim.terms.changes import Change, Unrelated
from lowmem.optim.terms.hyper import ChunkHyper, Hyper
from lowmem.optim.terms.split import Commit, Split
from lowmem.optim.terms.state import Constants, State, reset_

SCRATCH = 64 << 20  # bytes that a step may take beside what grows with a projected gradient


class AnyRule(ByRows, Asks):
    """What both kinds of rule have.

    Attributes:
        uses: settings of the parameter group that are read, of betas and eps (lr and decay always are).
        idle: no step, no decay, no state, and no use for a gradient.
        reads_later: what a `Direction` commits looks at the gradient once more.
        reads_weight: element by element (`ChunkHyper.weight`), so that the rule cannot step inside another.
        linear: the step is in units of the gradient: of twice the gradients, it is twice as long.
        period: steps between steps that take longer or hold more; 0 for none.
        keeps_sum: between those, the projected gradients of micro-batches may stand for their sum.
        own_decay: weight decay goes with the step: with its length, or by the elements that it takes.
    """

    idle: ClassVar[bool] = False

    @property
    def reads_later(self) -> bool:
        """Most do not."""
        return False

    @property
    def reads_weight(self) -> bool:
        """Most rules do not."""
        return False

    @property
    def linear(self) -> bool:
        """Most rules divide by the size of gradients."""
        return False

    @property
    def uses(self) -> frozenset[str]:
        """Both, where a rule does not say."""
        return frozenset({"betas", "eps"})

    @property
    def period(self) -> int:
        """All steps are alike."""
        return 0

    @property
    def keeps_sum(self) -> bool:
        """The whole gradient is needed."""
        return False

    @property
    def own_decay(self) -> bool:
        """Decay is decoupled."""
        return False

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that a step of an (m, n) weight may take beside weight, gradient and state."""
        return SCRATCH

    def init(self, x: Tensor) -> State:
        """Fresh state for a tensor like x; nothing."""
        return {}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """What steps of a weight of this shape read and never change; nothing."""
        return {}

    def prepare(self, g: Blocks, s: State, hp: Hyper) -> None:
        """What is rare, such as a refresh; branches on `hp.step` alone. Called by whoever holds the rule."""

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Carry the state over a change of coordinates that `check_rebase` allows: start afresh."""
        like = torch.empty(1, 1, device=hp.weight.device)
        reset_(s, {**self.init(like), **self.init(like[0])}, change.ok)  # a vector may be held otherwise

    def beside(self, s: State, shape: tuple[int, int], hp: Hyper) -> Blocks | None:
        """B, (m, n), where the method evaluates W + lr B; None where it evaluates the weight itself."""
        return None

    def check_rebase(self, kind: str) -> None:
        """Raise where keep, reset, permute or rotate is not defined for what is held."""
        if kind in ("permute", "rotate"):
            name = type(self).__name__
            raise UserError(f"on_refresh='rotate' is not defined for {name}; take 'keep' or 'reset'")


class Pointwise(AnyRule):
    """A rule that treats each block of `grain` elements alone.

    Attributes:
        grain: elements of a block; chunks are multiples of it.
        per: elements for each entry of a state tensor along dim 0; tensors left out are seen whole.
        fill: what an entry that pads a state tensor holds, where that is not 0.
        streams: names of the random streams that `step` uses.
        compilable: whether compiling the step pays.
        spills: bytes for each element that kernels of a compiled step leave each other on a card.
        chunk: the most elements (a multiple of `grain`) that should fit the cache in an eager step.
        measures: where `ChunkHyper.measures`, the new state has sums over the tensor in it: see `factor_`.
        readable: names of the moments that `moment` gives.
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
    def spills(self) -> int:
        """Nothing, where all of a step is one kernel."""
        return 0

    @property
    def chunk(self) -> int:
        """As many as fit the cache with a few temporaries."""
        return LADDER[0]

    @property
    def measures(self) -> bool:
        """Most rules know each element's step at once."""
        return False

    @property
    def readable(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def shards(self, shape: Shape) -> bool:
        """Where every shard starts on a block."""
        return shape.shard.starts_on(self.grain)

    def moment(self, name: str, s: State) -> Tensor:
        """A moment of a chunk as it is held before the step: fp32, a number for each element."""
        raise NotImplementedError(f"{type(self).__name__} holds no {name} that can be read")

    def factor_(self, s: State, ok: Tensor, hp: Hyper) -> Tensor:
        """Of sums without what is not finite, taken out of s: what the step is multiplied by, 0-D."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def scalars(self, s: State, hp: Hyper) -> Tensor | None:
        """The fp32 numbers that the step needs, once for each tensor; none."""
        return None

    def table(self, s: State, hp: Hyper) -> Tensor | None:
        """What `scalars` gives for each age of "age", a row for each; None where they depend on more."""
        return None

    def joins(self, s: State) -> bool:
        """Whether small tensors may step as rows of one, with `scalars` for each row, (k, rows, 1)."""
        return False

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """Pure: fp32 gradient chunk to fp32 direction and the new state of the chunk.

        A chunk is (rows, width), a row being one block of `grain` elements or, where that is 1, any
        number of them. A state tensor of one dimension comes as (rows, width / per), another as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no step")


class Rule(AnyRule):
    """A rule that needs the whole tensor."""

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Every step: update the state, give the step to be taken."""
        raise NotImplementedError(f"{type(self).__name__} takes no step")

    def project(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """What is summed over micro-batches instead of the gradient, where the rule `keeps_sum`; fp32."""
        raise NotImplementedError(f"{type(self).__name__} keeps no sum")


def is_pointwise(rule: AnyRule) -> TypeGuard[Pointwise]:
    """Which of the two kinds a rule is."""
    return isinstance(rule, Pointwise)


class Projector(ByRows):
    """Where a gradient is seen: R = down(G). Shapes are those of the (m, n) matrix.

    Attributes:
        changes: what a refresh can say of the coordinates: nothing ("reset"), "permute" or "rotate".
        dense: the basis spans one side, and R has a channel for each index of the other.
        orthonormal: down(up(R)) = R, and up(down(G)) is the nearest to G that can be seen.
        renews: refreshes bring other coordinates; follows: the basis moves after every step (`follow`).
        partial: what is not seen stays as it is, undecayed; any tensor is seen so, not matrices alone.
        period: steps between refreshes; 0 for never.
        reads: the moment of the inner rule that a refresh looks at; "" for none.
    """

    changes: ClassVar[str] = "reset"
    dense: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    follows: ClassVar[bool] = False
    partial: ClassVar[bool] = False

    @property
    def period(self) -> int:
        """Never."""
        return 0

    @property
    def reads(self) -> str:
        """None."""
        return ""

    def axis(self, shape: tuple[int, int]) -> int:
        """The axis of G, and of R, that a dense basis spans: 0 where R is (r, n), 1 where it is (m, r)."""
        return 1

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of down(G)."""
        raise NotImplementedError

    def complete(self, shape: tuple[int, int]) -> bool:
        """Whether up(down(G)) = G: nothing is left for a residual."""
        return False

    def init(self, x: Tensor) -> State:
        """The basis before the first refresh; none is held."""
        return {}

    def constants(self, shape: tuple[int, int]) -> Constants:
        """What the basis is made of and never changes; nothing."""
        return {}

    def due(self, hp: Hyper, s: State | None = None) -> bool:
        """Whether a refresh may fall on this step, at first and by the period; whether it does, given s."""
        return self.period > 0 and hp.due(self.period)

    def refresh(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Move the basis in place; with `say`, tell how as far as `changes` promises."""
        return Unrelated(torch.ones((), dtype=torch.bool, device=g.device))

    def opened(self, s: State, hp: Hyper) -> State:
        """What `down`, `up` and `pair` of one step read: what is held, unless it must be drawn or decoded."""
        return s

    def rounded(self, s: State, dtype: torch.dtype) -> State:
        """What was opened, cast once for all products of a step where nothing else reads it."""
        return s

    def down(self, s: State, g: Blocks, hp: Hyper) -> Tensor:
        """The projected gradient, fp32."""
        raise NotImplementedError

    def up(self, s: State, low: Tensor, i: int, j: int, hp: Hyper) -> Tensor:
        """Rows i..j of the lifted matrix; `hp.weight` gives shape and precision of products."""
        raise NotImplementedError

    def pair(self, s: State, low: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """(A, B) with up(low) = A B, where the lift is a product."""
        return None

    def follow(self, s: State, split: Split) -> State:
        """The basis after a step, where it `follows`: stored once the weight is written."""
        return {}


class Residual(ByRows):
    """What becomes of the part of a gradient that its projection does not see.

    Attributes:
        reads_rest: the rest, or the whole gradient, is looked at; if not, the projection is enough.
        lifts: the lifted step is taken too; if not, `absorb` gives all of the step.
        needs: what the projector must be, of "dense" and "orthonormal".
        needs_linear: the inner rule must be `linear`.
        uses: settings of the parameter group that are read, of betas and eps.
        takes: the moment of the inner rule of which `take_` is told what a change of basis loses; "".
    """

    reads_rest: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    needs_linear: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()

    def init(self, x: Tensor, axis: int | None = None) -> State:
        """State for a tensor like x whose dense basis, if any, spans this axis; nothing."""
        return {}

    def constants(self, shape: tuple[int, int]) -> Constants:
        """What is read and never changed; nothing."""
        return {}

    def inject(self, s: State, g: Blocks, hp: Hyper) -> Blocks:
        """The gradient with what is owed; pure, since a refresh and a step both call it."""
        return g

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The step that the rest takes, or None; and what to do once the weight is written."""
        return None, None

    @property
    def takes(self) -> str:
        """None."""
        return ""

    def take_(self, s: State, lost: Blocks, ok: Tensor, hp: Hyper) -> None:
        """What was lost of what it `takes`, lifted, (m, n); where ok (0-D bool) is False, nothing was."""

    def aside(self) -> AnyRule | None:
        """The rule of a tensor that a schedule puts aside, where there is one."""
        return None
