"""A rule made from a rule: step where a projection of the gradient is seen.

    R = down(G),  N = inner(R),  D = scale up(N) + absorb(G - up(R))

This is the heart: GaLore, FRUGAL, Online Subspace Descent, DCT and their kin are
this line with different parts. The order of one step is: refresh the basis,
carry the inner state over (`on_refresh`: keep, reset or rotate), inject what is
owed, project, step inside, absorb the rest. The inner rule overwrites the
projected gradient in place; the step is lifted row block by row block while it
is written, so no second matrix of the weight's size exists.

A gradient with a NaN or Inf in it makes the whole step not ok, and the tensor
stays as it was: the flag comes from the projected gradient, which any bad
element reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, Dense, Direction, Projected, matrix_shape
from lowmem.optim.contract import (
    AnyRule,
    Change,
    Hyper,
    Reset,
    Rotate,
    Rule,
    State,
    is_pointwise,
    prefixed,
    scoped,
)
from lowmem.optim.engine.chunks import all_finite
from lowmem.optim.projectors import Projector, Refreshed
from lowmem.optim.residuals import Drop, Residual

ON_REFRESH = ("keep", "reset", "rotate")


@dataclass(frozen=True)
class Subspace:
    """Step where a projection of the gradient is seen.

    Bytes for an (m, n) weight: the projector's, the inner rule's for the projected
    shape, the residual's. Workspace of a step: 4 r l for R (overwritten by N), as
    much again where the residual reads the rest.

    Args:
        projector: where the gradient is seen.
        inner: the rule that steps there.
        residual: what becomes of the rest.
        on_refresh: keep the inner state at a basis change, reset it, or rotate it along.
        scale: factor of the lifted step, above 0.

    Raises:
        UserError: a combination that is not defined, such as rotate with 8-bit moments.
    """

    projector: Projector
    inner: AnyRule
    residual: Residual = field(default_factory=Drop)
    on_refresh: str = "keep"
    scale: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.on_refresh not in ON_REFRESH:
            problems.append(f"unknown on_refresh {self.on_refresh!r}; {nearest(self.on_refresh, ON_REFRESH)}")
        if not self.scale > 0.0:
            problems.append(f"scale must be above 0, got {self.scale}")
        if self.on_refresh == "rotate" and not self.projector.rotates:
            problems.append("on_refresh='rotate' needs a dense basis; take on_refresh='reset'")
        try:
            self.inner.check_rebase(self.on_refresh)
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def _low(self, x: Tensor) -> Tensor:
        return torch.empty(self.projector.low_shape(matrix_shape(x.shape)), device="meta")

    def init(self, x: Tensor) -> State:
        """State of the three parts, under their names."""
        low = self._low(x)
        inner = self.inner.init(low if x.device.type == "meta" else torch.empty_like(low, device=x.device))
        rest = {} if self._complete(matrix_shape(x.shape)) else self.residual.init(x)
        return (
            prefixed("projector", self.projector.init(x))
            | prefixed("inner", inner)
            | prefixed("residual", rest)
        )

    def shared(self, x: Tensor) -> State:
        """Constants of the parts."""
        inner = self.inner.shared(torch.empty(0, device=x.device))
        return prefixed("projector", self.projector.shared(x)) | prefixed("inner", inner)

    def _complete(self, shape: tuple[int, int]) -> bool:
        # at full rank the rest is rounding noise, and its sign would be a full step
        return self.projector.complete(shape)

    def refreshes(self, hp: Hyper) -> bool:
        """Whether a refresh falls on this step."""
        return self.projector.due(hp)

    def prepare(self, g: Blocks, s: State, hp: Hyper) -> None:
        """Refresh the basis when it is due, and carry the inner state over."""
        if not self.refreshes(hp):
            return
        owed = self.residual.inject(scoped(s, "residual"), g)
        inner = scoped(s, "inner")
        done = self.projector.refresh(
            scoped(s, "projector"), owed, hp, inner, matrix=self.on_refresh == "rotate"
        )
        change = self._change(done)
        if change is not None:
            self.inner.rebase_(inner, change, self.projector.low_shape(g.shape), hp)

    def _change(self, done: Refreshed) -> Change | None:
        if self.on_refresh == "reset":
            return Reset(done.ok)
        if self.on_refresh == "rotate" and done.matrix is not None:
            return Rotate(done.matrix, done.axis)
        return None

    def project(self, g: Blocks, s: State) -> Tensor:
        """down(G) for accumulation over micro-batches; fp32."""
        return self.projector.down(scoped(s, "projector"), g)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Project, step inside, lift."""
        view, rest = scoped(s, "projector"), scoped(s, "residual")
        low, seen = self._seen(g, view, rest)
        reads = self.residual.reads_rest and not self._complete(g.shape)
        before = low.clone() if reads else low
        inside, ok = self._step_inside(low, scoped(s, "inner"), hp)
        commit = prefixed("inner", inside.commit) if inside else {}
        lr, decay = (inside.lr, inside.decay) if inside else (None, None)
        if not reads:
            pair = self.projector.pair(view, low, g.shape)
            lifted = self._lifted(view, low, g)
            return Direction(lifted, pair, self.scale, lr=lr, decay=decay, ok=ok, commit=commit)
        if self.scale != 1.0:
            low.mul_(self.scale)
        step = self.residual.absorb(rest, self._rest(view, before, seen))
        return Direction(self._both(view, low, seen, step), lr=lr, decay=decay, ok=ok, commit=commit)

    def _seen(self, g: Blocks, view: State, rest: State) -> tuple[Tensor, Blocks]:
        if isinstance(g, Projected):
            return g.low, g
        owed = self.residual.inject(rest, g)
        return self.projector.down(view, owed), owed

    def _step_inside(self, low: Tensor, inner: State, hp: Hyper) -> tuple[Direction | None, Tensor]:
        """Overwrite R by the inner rule's direction N; the inner rule may refuse the step."""
        if is_pointwise(self.inner):
            return None, hp.advance(self.inner, low, inner, hp)
        direction = cast("Rule", self.inner).update(Dense(low), inner, hp)
        ok = all_finite(low, hp) if direction.ok is None else direction.ok
        for i, j in direction.blocks.ranges():
            low[i:j] = torch.where(ok, direction.blocks.rows(i, j), 0.0)
        if direction.then is not None:
            hp.advance(direction.then[0], low, direction.then[1], hp, ok)
        return direction, ok

    def _lifted(self, view: State, low: Tensor, g: Blocks) -> Blocks:
        return Blocks(g.shape, lambda i, j: self.projector.up(view, low, i, j, g), g.device)

    def _rest(self, view: State, before: Tensor, seen: Blocks) -> Blocks:
        def rows(i: int, j: int) -> Tensor:
            return seen.rows(i, j) - self.projector.up(view, before, i, j, seen)

        return Blocks(seen.shape, rows, seen.device)

    def _both(self, view: State, low: Tensor, seen: Blocks, step: Blocks | None) -> Blocks:
        lifted = self._lifted(view, low, seen)
        if step is None:
            return lifted
        return Blocks(seen.shape, lambda i, j: lifted.rows(i, j) + step.rows(i, j), seen.device)

    def check_rebase(self, kind: str) -> None:
        """A subspace inside a subspace has no meaning."""
        raise UserError(
            "a subspace rule cannot be the inner rule of another; take adam, adafactor or sgd inside"
        )

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Never called: see check_rebase."""
        self.check_rebase("keep")
