"""A rule made from a rule: step where a projection of the gradient is seen.

    R = down(G),  N = inner(R),  D = scale up(N) + absorb(G - up(R))

This is the heart: GaLore, FRUGAL, Fira, APOLLO, Online Subspace Descent, DCT and their
kin are this line with different parts. The order of one step is: refresh the basis,
carry the inner state over (`on_refresh`: keep, reset or rotate), inject what is
owed, project, step inside, absorb the rest, write, and then commit what residual,
inner rule and a basis that follows have left to do.

N overwrites R in place, unless somebody still looks at R. The step is lifted row block
by row block while it is written, so no second matrix of the weight's size exists.

A gradient with a NaN or Inf makes the whole step not ok: it reaches the projected one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, Dense, Direction, Projected, chained, matrix_shape
from lowmem.optim.contract import AnyRule, Projector, Residual, Rule, is_pointwise
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.engine.finite import all_finite, unsound
from lowmem.optim.formulas import Formula, Lifted, Product, minus
from lowmem.optim.residuals.rest import Drop
from lowmem.optim.shards import Shape, shard_in
from lowmem.optim.terms.changes import Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.split import Commit, Split
from lowmem.optim.terms.state import Constant, Constants, State, apply_in_place, prefixed, scoped

T = TypeVar("T")

ON_REFRESH = ("keep", "reset", "rotate")


@dataclass(frozen=True)
class Inside:
    """What an inner rule has done: N is in place, and this is left.

    Args:
        ok: 0-D bool; False where it refuses the step.
        lr, decay, scale, commit: as in `Direction`.
    """

    ok: Tensor
    lr: Tensor | None = None
    decay: Tensor | None = None
    scale: float = 1.0
    commit: Commit | None = None


@dataclass(frozen=True)
class Subspace(Rule):
    """Step where a projection of the gradient is seen.

    Bytes for an (m, n) weight: the projector's, the inner rule's for the projected
    shape, the residual's. Workspace of a step: 4 r l for R (overwritten by N), as
    much again where the residual or the basis looks at R after the step.

    Args:
        projector: where the gradient is seen.
        inner: the rule that steps there.
        residual: what becomes of the rest.
        on_refresh: keep the inner state at a change of coordinates, reset it, or carry it along
            (rotate; coordinates that are only permuted take their ages along).
        scale: factor of the lifted step, above 0.

    Raises:
        UserError: combinations that are not defined, such as rotate with 8-bit moments; all of them.
    """

    projector: Projector
    inner: AnyRule
    residual: Residual = field(default_factory=Drop)
    on_refresh: str = "keep"
    scale: float = 1.0

    def __post_init__(self) -> None:
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise UserError("; ".join(problems))

    def _problems(self) -> list[str]:
        found = []
        if self.on_refresh not in ON_REFRESH:
            return [f"unknown on_refresh {self.on_refresh!r}; {nearest(self.on_refresh, ON_REFRESH)}"]
        if not self.scale > 0.0:
            found.append(f"scale must be above 0, got {self.scale}")
        if self.on_refresh == "rotate" and self.projector.changes == "reset":
            found.append("on_refresh='rotate' needs a dense basis; leave on_refresh out")
        else:
            carried = self.projector.changes if self.on_refresh == "rotate" else self.on_refresh
            found.append(_refusal(self.inner.check_rebase, carried))
        if self.inner.reads_weight:
            found.append("a rule that reads the weight cannot step inside a subspace; take projector=none")
        if self.projector.partial and self.residual.reads_rest:
            found.append("what this projector does not see stays as it is: take residual=drop")
        found.append(self._unreadable())
        if self.residual.needs_linear and not self.inner.linear:
            found.append("the residual divides by norms of gradients, the rule must not; take rule=average")
        lacking = [word for word in sorted(self.residual.needs) if not getattr(self.projector, word)]
        if lacking:
            found.append(f"the residual needs a projector with {' and '.join(lacking)} basis; take power")
        return found

    def _unreadable(self) -> str:
        """What is wrong with the moments that projector and residual look at."""
        if self.residual.takes and self.on_refresh != "rotate":
            return "a residual that takes what moments lose needs moments that follow; take on_refresh=rotate"
        asked = {name for name in (self.projector.reads, self.residual.takes) if name}
        lacking = sorted(asked - self.inner.init(torch.empty(1, 1, device="meta")).keys()) if asked else []
        sentence = "the rule must hold {} as it is; take rule=adam with states=fp32 or bf16"
        return sentence.format(" and ".join(lacking)) if lacking else ""

    @property
    def uses(self) -> frozenset[str]:
        """Those of the inner rule and of the residual."""
        return self.inner.uses | self.residual.uses

    @property
    def probes(self) -> int:
        """Those of the inner rule."""
        return self.inner.probes

    def sense_(self, g: Blocks, s: State, hp: Hyper, count: Tensor) -> None:
        """What is seen of it, for the inner rule; the first step's basis is not there yet."""
        if hp.first:
            self.prepare(g, s, hp)
        low, shape = self.project(g, s, hp), self.projector.low_shape(g.shape)
        self.inner.sense_(Dense(low, shape=shape), scoped(s, "inner"), hp.inside(shape), count)

    @property
    def own_decay(self) -> bool:
        """That of the inner rule."""
        return self.inner.own_decay or self.projector.partial

    @property
    def period(self) -> int:
        """That of the projector."""
        return self.projector.period

    @property
    def keeps_sum(self) -> bool:
        """Where nobody looks at the whole gradient between refreshes, and there is a between."""
        looks = self.residual.reads_rest or self.projector.follows or self.projector.partial
        return not looks and self.period != 1

    def whole(self, s: State, hp: Hyper) -> bool:
        """Where it does not keep the sum, and where the basis is found in it."""
        return not self.keeps_sum or self.projector.due(hp, scoped(s, "projector"))

    def shards(self, shape: Shape) -> bool:
        """Where all parts take rows, and shards of R, if it is spread, start on a block of the inner rule."""
        takes, low = self.projector.shards(shape), self.projector.low_shape(matrix_shape(shape))
        inside = not isinstance(low, Shape) or self.inner.shards(low)
        return takes and self.residual.shards(shape) and inside

    def unsound(self, g: Blocks, s: State, hp: Hyper) -> Tensor | None:
        """Of what is seen, where R is spread; where it is not, all ranks have it."""
        if shard_in(self.projector.low_shape(g.shape)) is None:
            return None
        if isinstance(g, Projected) or not self.projector.dense:
            return unsound(g.low if isinstance(g, Projected) else self.project(g, s, hp))
        return g.sum(unsound).clamp(max=1.0)  # a dense basis sees every element

    def scratch(self, shape: tuple[int, int]) -> int:
        """R, R once more where it is looked at after the step, and what the inner rule takes."""
        low = self.projector.low_shape(shape)
        return self.inner.scratch(low) + (8 if self._looks(shape) else 4) * low[0] * low[1]

    def _absorbs(self, shape: tuple[int, int]) -> bool:
        # at full rank the rest is rounding noise, and its sign would be a full step
        whole = self.residual.lifts and self.projector.complete(shape)
        return self.residual.reads_rest and not whole

    def _with_owed(self, g: Blocks, s: State, hp: Hyper) -> Blocks:
        """The gradient with what the residual owes; it holds nothing where there is no rest."""
        return self.residual.inject(scoped(s, "residual"), g, hp) if self._absorbs(g.shape) else g

    def _looks(self, shape: tuple[int, int]) -> bool:
        """Whether R is looked at once N is made."""
        return self.projector.follows or self.inner.reads_later or self._absorbs(shape)

    def _rounds(self, g: Blocks, hp: Hyper) -> bool:
        """Whether the basis is cast once: products alone read it, and a launch costs more than memory."""
        products = isinstance(g, Dense) and g.dtype == hp.weight.dtype and not self.projector.follows
        return products and not sizes(g.device).at_hand

    def _carries_ages(self) -> bool:
        return self.on_refresh == "rotate" and self.projector.changes == "permute"

    def init(self, x: Tensor) -> State:
        """State of the three parts, under their names."""
        shape = matrix_shape(x.shape)
        low = self.projector.low_shape(shape)
        inner = self.inner.init(torch.empty(low, device=x.device))
        if self._carries_ages() and "age" in inner:
            inner["age"] = inner["age"].repeat(low[self.projector.axis(shape)])
        axis = self.projector.axis(shape) if self.projector.dense else None
        rest = self.residual.init(x, axis) if self._absorbs(shape) else {}
        return _of_parts(self.projector.init(x), inner, rest)

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """Those of the parts; where columns have ages, how many elements lie between two columns."""
        matrix = matrix_shape(shape)
        low = self.projector.low_shape(matrix)
        inner = dict(self.inner.constants(low))
        if self._carries_ages():
            stride = low[1] if self.projector.axis(matrix) == 0 else 1
            make = functools.partial(torch.full, (), stride, dtype=torch.int32)
            inner["stride"] = Constant(f"stride{stride}", lambda device: make(device=device))
        return _of_parts(self.projector.constants(matrix), inner, self.residual.constants(matrix))

    def check_rebase(self, kind: str) -> None:
        """A subspace inside a subspace has no meaning."""
        raise UserError("a subspace rule cannot be inside another; take adam, adafactor or sgd there")

    def beside(self, s: State, shape: tuple[int, int], hp: Hyper) -> Blocks | None:
        """What the inner rule says, lifted as its steps are."""
        found = self.inner.beside(scoped(s, "inner"), self.projector.low_shape(shape), hp)
        if found is None:
            return None
        low = torch.cat([found.rows(i, j) for i, j in found.ranges()]) * self.scale
        basis, up = self.projector.opened(scoped(s, "projector"), hp), self.projector.up
        return Blocks(shape, lambda i, j: up(basis, low, i, j, hp), found.device)

    def prepare(self, g: Blocks, s: State, hp: Hyper) -> None:
        """Refresh the basis when it is due, and carry the inner state over."""
        if not self.projector.due(hp):
            return
        inner, rotates = scoped(s, "inner"), self.on_refresh == "rotate"
        moment = self.residual.takes if self._absorbs(g.shape) else ""
        before = self._lifted(moment, s, hp) if moment else None
        seen = hp.seen(self._with_owed(g, s, hp))
        change = self.projector.refresh(scoped(s, "projector"), seen, hp, inner, say=rotates)
        if self.on_refresh != "keep":
            low = self.projector.low_shape(g.shape)
            self.inner.rebase_(inner, change if rotates else Unrelated(change.ok), low, hp.inside(low))
        if before is not None:
            lost = Formula(minus, (before, self._lifted(moment, s, hp)))
            self.residual.take_(scoped(s, "residual"), lost, change.ok, hp)

    def _lifted(self, name: str, s: State, hp: Hyper) -> Blocks:
        """A moment as it is now, lifted; products are fp32 whatever the weight."""
        low = scoped(s, "inner")[name].clone()
        basis = {key: x.clone() for key, x in self.projector.opened(scoped(s, "projector"), hp).items()}
        exact = replace(hp, weight=Blocks(hp.weight.shape, None, hp.weight.device))
        return self._lift(basis, low, exact.weight.shape, exact)

    def _lift(self, basis: State, low: Tensor, shape: tuple[int, int], hp: Hyper) -> Blocks:
        """up(low), a product where it is one."""
        pair, up = self.projector.pair(basis, low, shape), self.projector.up
        if pair is not None:
            return Product(pair, hp.weight.dtype)
        return Lifted(shape, lambda i, j: up(basis, low, i, j, hp), low.device)

    def project(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """down(G) for accumulation over micro-batches; fp32."""
        return self.projector.down(self.projector.opened(scoped(s, "projector"), hp), g, hp)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Project, step inside, lift, and add what the rest gives."""
        whole = g if isinstance(g, Projected) else hp.seen(self._with_owed(g, s, hp))
        basis = self.projector.opened(scoped(s, "projector"), hp)
        if self._rounds(whole, hp):
            basis = self.projector.rounded(basis, whole.dtype)
        low = g.low if isinstance(g, Projected) else self.projector.down(basis, whole, hp)
        step = low.clone() if self._looks(g.shape) else low
        inside = self._step_inside(low, step, scoped(s, "inner"), hp)
        if self.projector.partial:
            inside = self._decayed(inside, basis, step, hp)
        split = self._split(basis, whole, low, step, inside, hp)
        absorbs = self._absorbs(g.shape)
        absorbed, owe = self.residual.absorb(scoped(s, "residual"), split) if absorbs else (None, None)
        commit = chained([inside.commit, owe, self._follow(s, split) if self.projector.follows else None])
        done = Direction(split.lifted, split.pair, split.scale, inside.lr, inside.decay, inside.ok, commit)
        if absorbed is None:
            return done
        blocks = split.with_rest(absorbed) if self.residual.lifts else absorbed
        return replace(done, blocks=blocks, pair=None, scale=1.0)

    def _decayed(self, inside: Inside, basis: State, step: Tensor, hp: Hyper) -> Inside:
        """What a partial projector does not see stays as it is: the decay becomes part of the step."""
        if hp.weight_decay:
            share = hp.weight_decay / (self.scale * inside.scale)
            step.add_(self.projector.down(basis, hp.weight, hp), alpha=share)
        return replace(inside, decay=hp.vector(1.0)[0])

    def _follow(self, s: State, split: Split) -> Commit:
        """The move of a basis that goes by each step, left for after the write."""
        moving = scoped(s, "projector")
        return lambda: apply_in_place(moving, self.projector.follow(moving, split))

    def _step_inside(self, low: Tensor, step: Tensor, inner: State, hp: Hyper) -> Inside:
        """Make a step of a projected gradient, in place.

        Args:
            low: R; step: R too, and N afterwards. They are one tensor where nobody looks at R again.
            inner: the inner rule's state and constants; hp: of this step.
        """
        shape = self.projector.low_shape(hp.weight.shape)
        g, hp = Dense(low, shape=shape), hp.inside(shape)
        self.inner.prepare(g, inner, hp)
        if is_pointwise(self.inner):
            return Inside(hp.advance(self.inner, step, inner, hp))
        d = cast("Rule", self.inner).update(g, inner, hp)
        ok = all_finite(low, hp) if d.ok is None else d.ok
        flat, width = step.view(-1), d.blocks.shape[1]  # it may see the elements in another shape
        for i, j in d.blocks.ranges():
            flat[i * width : j * width] = torch.where(ok, d.blocks.rows(i, j), 0.0).reshape(-1)
        if d.then is not None:
            hp.advance(d.then[0], step, d.then[1], hp, ok)
        return Inside(ok, d.lr, d.decay, d.scale, d.commit)

    def _split(
        self, basis: State, whole: Blocks, low: Tensor, step: Tensor, inside: Inside, hp: Hyper
    ) -> Split:
        return Split(
            g=whole,
            lift=lambda x: self._lift(basis, x, whole.shape, hp),
            pair=self.projector.pair(basis, step, whole.shape),
            low=low,
            step=step,
            sees=self.projector.dense,
            scale=self.scale * inside.scale,
            axis=self.projector.axis(whole.shape),
            ok=inside.ok,
            hp=hp,
        )


def _of_parts(projector: Mapping[str, T], inner: Mapping[str, T], residual: Mapping[str, T]) -> dict[str, T]:
    return prefixed("projector", projector) | prefixed("inner", inner) | prefixed("residual", residual)


def _refusal(check: Callable[[str], None], kind: str) -> str:
    try:
        check(kind)
    except UserError as error:
        return str(error)
    return ""
