"""A rule with modifiers around it.

    g <- before(g),  d = rule(g),  d <- shape(g, d),  W <- decay W - lr f d

f is the product of the modifiers' factors, each of which follows from sums over the
tensor. A pointwise rule adds them up in the kernel that steps. Where it steps a
projected gradient, f is known when the step is there, and multiplies it. Where it
steps a weight, the kernel runs twice: once for the sums alone, with everything that
is not needed for them left out, then for the step, with f in the learning rate. The
step of a rule that needs the whole tensor is read twice by blocks instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import AnyRule, Pointwise, Rule, is_pointwise
from lowmem.optim.engine.cutting import walk
from lowmem.optim.modifiers.chain import SUMS, Chain
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.shards import Shape
from lowmem.optim.terms.changes import Change, Unrelated
from lowmem.optim.terms.hyper import ChunkHyper, Hyper
from lowmem.optim.terms.its import its
from lowmem.optim.terms.state import Constants, State, prefixed, scoped


def modified(rule: AnyRule, modifiers: Sequence[Modifier]) -> AnyRule:
    """A rule with modifiers around it, the first nearest to it; equal ones are one object.

    Args:
        rule: of either kind; one with modifiers gets these around them.
        modifiers: none to leave it as it is.

    Raises:
        UserError: a modifier twice, or one that the rule cannot serve; all of them.

    Example:
        >>> from lowmem.optim.elementwise import coded
        >>> from lowmem.optim.modifiers.masks import Cautious
        >>> from lowmem.optim.rules.elementwise.adam import Adam
        >>> sorted(modified(coded(Adam()), [Cautious()]).init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq', 'modified.sums']
    """
    if modifiers and isinstance(rule, Modified | ModifiedRule):
        return _modified(rule.rule, (*rule.chain.modifiers, *modifiers))
    return _modified(rule, tuple(modifiers)) if modifiers else rule


@functools.cache
def _modified(rule: AnyRule, modifiers: tuple[Modifier, ...]) -> AnyRule:
    if is_pointwise(rule):
        return Modified(rule, Chain(modifiers))
    return ModifiedRule(cast("Rule", rule), Chain(modifiers))


@dataclass(frozen=True)
class Wrapped(AnyRule):
    """What a rule of either kind with modifiers has of the rule that it stands around.

    Raises:
        UserError: a modifier that the rule cannot serve; all of them.
    """

    rule: AnyRule
    chain: Chain

    def __post_init__(self) -> None:
        problems = list(self.chain.problems(self.rule))
        if self.rule.joint:
            problems.append("a step by sums over all tensors takes no modifiers; leave them out")
        if problems:
            raise UserError("; ".join(problems))

    uses = its("rule")
    period = its("rule")

    @property
    def reads_weight(self) -> bool:
        """Where the rule or a modifier does."""
        return self.rule.reads_weight or self.chain.reads_weight

    own_decay = its("rule")

    @property
    def probes(self) -> int:
        """Those of the rule."""
        return self.rule.probes

    def sense_(self, g: Blocks, s: State, hp: Hyper, count: Tensor) -> None:
        """For the rule."""
        self.rule.sense_(g, self.own(s), hp, count)

    def scratch(self, shape: tuple[int, int]) -> int:
        """That of the rule."""
        return self.rule.scratch(shape)

    def check_rebase(self, kind: str) -> None:
        """What is held of the length of steps is the same in any basis."""
        self.rule.check_rebase(kind)

    def own(self, s: State) -> State:
        """What the rule sees of the state."""
        return s

    def prepare(self, g: Blocks, s: State, hp: Hyper) -> None:
        """Let the rule forget its moments where a modifier says so, then what it has to do itself."""
        if self.chain.begin_(s, hp):
            always = torch.ones((), dtype=torch.bool, device=g.device)
            self.rule.rebase_(self.own(s), Unrelated(always), g.shape, hp)
        self.rule.prepare(g, self.own(s), hp)

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """The rule's moments alone."""
        self.rule.rebase_(self.own(s), change, shape, hp)


@dataclass(frozen=True)
class Modified(Wrapped, Pointwise):
    """A pointwise rule with modifiers; made by `modified`.

    Bytes: the rule's, what the modifiers hold, 8 for each sum.
    """

    rule: Pointwise

    grain = its("rule")
    per = its("rule")
    fill = its("rule")
    streams = its("rule")
    compilable = its("rule")
    chunk = its("rule")
    spills = its("rule")
    readable = its("rule")

    @property
    def measures(self) -> bool:
        """Where a modifier asks for sums."""
        return self.chain.count > 0

    def shards(self, shape: Shape) -> bool:
        """Where the rule does."""
        return self.rule.shards(shape)

    def init(self, x: Tensor) -> State:
        """The rule's state and the modifiers'."""
        return self.rule.init(x) | self.chain.init(x)

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """Those of the rule."""
        return self.rule.constants(shape)

    def scalars(self, s: State, hp: Hyper) -> Tensor | None:
        """Those of the rule."""
        return self.rule.scalars(s, hp)

    def table(self, s: State, hp: Hyper) -> Tensor | None:
        """That of the rule."""
        return self.rule.table(s, hp)

    def moment(self, name: str, s: State) -> Tensor:
        """That of the rule."""
        return self.rule.moment(name, s)

    def beside(self, s: State, shape: tuple[int, int], hp: Hyper) -> Blocks | None:
        """What the rule says."""
        return self.rule.beside(s, shape, hp)

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The shaped step; where they are asked for, the sums with those of this chunk."""
        moments = {name: self.moment(name, s) for name in self.chain.needs}
        if moments:
            g = self.chain.before(g, moments, _age(s, hp))
        d, new = self.rule.step(g, s, hp)
        if not hp.keeps:
            new = {}
        d = torch.where(hp.finite, d, 0.0)
        if hp.measures:
            new = {**new, SUMS: s[SUMS] + self.chain.sums(g, d, hp.weight, moments)}
        d = self.chain.shaped(g, d, moments)
        return (d * self.chain.pace(s) if self.chain.pacing else d), new

    def factor_(self, s: State, ok: Tensor, hp: Hyper) -> Tensor:
        """The product of the modifiers' factors."""
        factor = self.chain.factor_(hp.total(s[SUMS]), s, ok)
        s[SUMS].zero_()
        return factor


def _age(s: State, hp: ChunkHyper) -> Tensor:
    """Steps that the moments have seen with this one: of all, or of each element where columns have ages.

    1 where the rule does not count.
    """
    if "age" not in s:
        return torch.ones((), dtype=torch.int32, device=hp.ok.device)
    age = s["age"]
    return age if age.dim() == 0 else age[(hp.position // s["stride"]) % age.shape[0]]


@dataclass(frozen=True)
class ModifiedRule(Wrapped, Rule):
    """A rule that needs the whole tensor, with modifiers; made by `modified`.

    Where the rule ends in a pointwise one (Adafactor's momentum), they modify that, and what it is given
    stands for the gradient. Bytes: the rule's, what the modifiers hold, 8 for each sum.
    """

    rule: Rule

    reads_later = its("rule")

    @property
    def keeps_sum(self) -> bool:
        """Where the rule does and no modifier looks at the whole gradient."""
        return self.rule.keeps_sum and not self.chain.reads_gradient

    def whole(self, s: State, hp: Hyper) -> bool:
        """Where the rule asks for it, or a modifier."""
        return self.chain.reads_gradient or self.rule.whole(self.own(s), hp)

    def shards(self, shape: Shape) -> bool:
        """Where the rule does."""
        return self.rule.shards(shape)

    def unsound(self, g: Blocks, s: State, hp: Hyper) -> Tensor | None:
        """What the rule says."""
        return self.rule.unsound(g, scoped(s, "rule"), hp)

    def init(self, x: Tensor) -> State:
        """The rule's state under "rule", and the modifiers'."""
        return prefixed("rule", self.rule.init(x)) | self.chain.init(x)

    def own(self, s: State) -> State:
        """What lies under "rule"."""
        return scoped(s, "rule")

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """Those of the rule."""
        return prefixed("rule", self.rule.constants(shape))

    def beside(self, s: State, shape: tuple[int, int], hp: Hyper) -> Blocks | None:
        """What the rule says."""
        return self.rule.beside(scoped(s, "rule"), shape, hp)

    def project(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """That of the rule."""
        return self.rule.project(g, self.own(s), hp)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """The rule's step, shaped, with the factor in its step size."""
        d = self.rule.update(g, self.own(s), hp)
        if d.then is not None:
            last, held = d.then
            held = held | prefixed("modified", scoped(s, "modified"))
            return replace(d, then=(_modified(last, self.chain.modifiers), held))
        step = _Shaped(self.chain, g, d.blocks)
        if not (self.chain.count or self.chain.pacing):
            return replace(d, blocks=step, pair=None)
        lr = hp.rate if d.lr is None else d.lr
        return replace(d, blocks=step, pair=None, lr=lr * self._factor(step, d, s, hp))

    def _factor(self, step: _Shaped, d: Direction, s: State, hp: Hyper) -> Tensor:
        """The product of the modifiers' factors."""
        if self.chain.pacing:
            return self.chain.pace(s)
        ok = torch.ones((), dtype=torch.bool, device=step.device) if d.ok is None else d.ok
        sums = torch.stack([step.sums(i, j, hp) for i, j in walk(step.ranges(), step.device)]).sum(0)
        return self.chain.factor_(hp.total(sums), s, ok, d.scale)


class _Shaped(Blocks):
    """A step as modifiers shape it; what is not finite stays so, for the frame to refuse.

    Args:
        chain: the modifiers; g: the gradient; d: the step.
    """

    def __init__(self, chain: Chain, g: Blocks, d: Blocks) -> None:
        super().__init__(d.shape, None, d.device)
        self.chain, self.g, self.d = chain, g, d

    def _seen(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Gradient and step; a modifier that does not read the gradient gets the step instead."""
        d = self.d.rows(i, j)
        return (self.g.rows(i, j) if self.chain.reads_gradient else d), d

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j of the step that is taken."""
        g, d = self._seen(i, j)
        return torch.where(d.isfinite(), self.chain.shaped(g, d), d)

    def sums(self, i: int, j: int, hp: Hyper) -> Tensor:
        """The sums over rows i..j, (count,) fp64."""
        g, d = self._seen(i, j)
        w = hp.weight.rows(i, j) if self.chain.reads_weight else None
        return self.chain.sums(g, torch.where(d.isfinite(), d, 0.0), w)
