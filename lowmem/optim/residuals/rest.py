"""What a projection does not see, forgotten or made a step of its own.

    rest = G - up(down(G))

What a residual makes of it (`absorb`) works on `Blocks`, so no full-size copy is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks
from lowmem.optim.contract import AnyRule, Residual, Rule
from lowmem.optim.elementwise import coded
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.compact.subsets import Subsets
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.shards import Shape, shard_in, total, whole
from lowmem.optim.terms.fp32 import LARGEST, LARGEST_MEAN, TINY
from lowmem.optim.terms.split import Commit, Split
from lowmem.optim.terms.state import State, apply_in_place


@dataclass(frozen=True)
class Rest(Rule):
    """The rule of a tensor that is put aside: no step, no decay, no gradient, no state."""

    idle: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()


@dataclass(frozen=True)
class Drop(Residual):
    """Forget the rest (GaLore)."""

    reads_rest: ClassVar[bool] = False

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def aside(self) -> AnyRule:
        """No step."""
        return Rest()


@dataclass(frozen=True)
class Stateless(Residual):
    """Step by the rest or by its sign, scaled (FRUGAL, arXiv 2411.07837).

    Args:
        sign: signSGD if True, SGD if False.
        scale: factor of the learning rate.
    """

    sign: bool = True
    scale: float = 1.0

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """scale sign(rest) or scale rest; what is not finite stays so, for the frame to refuse."""
        return Formula(self.of, (split.rest,)), None

    def of(self, x: Tensor) -> Tensor:
        """The step of rows of the rest."""
        return (torch.where(x.isfinite(), x.sign(), x) if self.sign else x) * self.scale

    def aside(self) -> AnyRule:
        """The same step, of the whole gradient."""
        return coded(SGD(self.scale, sign=self.sign))


@dataclass(frozen=True)
class ScaledRest(Residual):
    """Step by the rest, each channel as much longer as the inner rule makes it (Fira, arXiv 2410.01623).

        phi_j = |N_j| / (|R_j| + 1e-8),  d = scale phi_j rest_j,  |d| <= limit |d of the step before|

    A channel is a column of a gradient that is projected on the left, a row of one that
    is projected on the right. Bias correction is part of N, hence of phi.

    A step of length 0 neither sets a limit nor loosens one. Published code leaves the first step without
    any: where a basis sees nothing of a gradient, R_j is rounding noise and phi_j up to 1e8 |N_j|. Here the
    first has at most ten times the length of N in all directions, |N| sqrt(s / r) for r of s. Without a
    limit phi is what it is.

    Holds 4 bytes where there is a limit, and looks at the rest once more for its norm.

    Args:
        scale: factor of the learning rate, above 0.
        limit: how much longer than the step before a step may be, at least 1; 0 for no limit.
        per: "channel", or "tensor" for one factor for all (APOLLO-Mini).

    Raises:
        UserError: a number or word outside its range.
    """

    scale: float = 1.0
    limit: float = 1.01
    per: str = "channel"
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})

    def __post_init__(self) -> None:
        if not self.scale > 0.0 or not (self.limit == 0.0 or self.limit >= 1.0):
            raise UserError(
                f"scale must be above 0 and limit at least 1, or 0 for none, got {self.scale}, {self.limit}"
            )
        if self.per not in PER:
            raise UserError(f"unknown per {self.per!r}; {nearest(self.per, PER)}")

    def shards(self, shape: Shape) -> bool:
        """Always."""
        return True

    def init(self, x: Tensor, axis: int | None = None) -> State:
        """The norm of the step before; 0 before the first."""
        return {"norm": torch.zeros((), device=x.device)} if self.limit else {}

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The scaled step, and its norm for the next one."""
        hp, factors = split.hp, self._factors(split)
        if not self.limit:
            return self._scaled(split, factors), None
        norms = torch.empty(split.g.shape[0], dtype=torch.float64, device=split.g.device)
        hp.sweep(_note_norms, self._scaled(split, factors), (norms,))
        alone, new = shard_in(split.g.shape) is None, torch.empty_like(s["norm"])
        squares = norms if alone else total(split.g.shape, norms.square().sum())
        own = split.step if alone or split.axis == 0 else _length(split.step, split)
        given = (factors, squares, s["norm"], own, self._reach(split), split.ok, new)
        hp.reckon(_limit_, given, (self.limit, alone))
        return self._scaled(split, factors), lambda: apply_in_place(s, {"norm": new})

    def _reach(self, split: Split) -> Tensor:
        """How many times as long as N a step may be that has none before it."""
        full, seen = whole(split.g.shape)[split.axis], split.low.shape[split.axis]
        return split.hp.vector(FIRST * self.scale * math.sqrt(full / seen), dtype=torch.float32)

    def _factors(self, split: Split) -> Tensor:
        """phi times the scale, one for each row or column of the gradient."""
        if self.per == "channel":
            factors = torch.empty(split.step.shape[1 - split.axis], device=split.step.device)
            split.hp.reckon(_note_factors, (factors, split.step, split.low), (split.axis, self.scale))
            return factors
        count = split.step.shape[1 - split.axis]
        own, seen = (_length(x, split).expand(count) for x in (split.step, split.low))
        return (own / (seen + 1e-8)).mul_(self.scale)

    def _scaled(self, split: Split, factors: Tensor) -> Blocks:
        source = split.rest if self.lifts else split.g

        down, across = ((), (factors,)) if split.axis == 0 else ((factors,), ())
        return Formula(torch.mul, (source,), down, across)


PER = ("channel", "tensor")
FIRST = 10.0
"""The length of a first step, at most, in those of N as if it had all directions."""
SMALL = 2.0**-64
"""Numbers times it have squares."""


def _length(x: Tensor, split: Split) -> Tensor:
    """The norm of all channels, (1,); where they are rows, of those of all ranks."""
    norm, shard = torch.empty(1, device=x.device), shard_in(split.g.shape)
    split.hp.reckon(_note_length, (norm, x), (split.axis,))
    if shard is None or split.axis == 0:
        return norm
    both = shard.total(torch.cat((norm, norm * SMALL)).square()).sqrt()
    return torch.where(both[:1].isfinite(), both[:1], both[1:] / SMALL)


def _note_length(norm: Tensor, x: Tensor, axis: int) -> None:
    norm.copy_(_norms(_norms(x, axis), 0))


def _norms(x: Tensor, dim: int) -> Tensor:
    """Norms along a dimension; where squares have no fp32, those over the largest element, times it."""
    plain: Tensor = torch.linalg.vector_norm(x, dim=dim)
    eager = x.is_cpu and not torch.compiler.is_compiling()  # a copy of x is made only where it is needed
    if x.is_meta or not x.numel() or (eager and bool(plain.isfinite().all())):
        return plain
    top = torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=True).clamp(min=TINY)
    over = torch.linalg.vector_norm(x / top, dim=dim)
    return torch.where(plain.isfinite(), plain, over * top.squeeze(dim))


def _note_factors(factors: Tensor, step: Tensor, low: Tensor, axis: int, scale: float) -> None:
    own, seen = (_norms(x, axis) for x in (step, low))
    factors.copy_((own / (seen + 1e-8)).mul_(scale))


def _limit_(
    factors: Tensor, squares: Tensor, before: Tensor, own: Tensor, reach: Tensor, ok: Tensor, new: Tensor,
    limit: float, alone: bool,
) -> None:  # fmt: skip
    """Shorten a step that is longer than the one before allows, and note how long it is.

    Args:
        squares: the norms of the rows, where all rows are here (`alone`); the sum of their squares elsewhere.
        own: what has the norm that a first step is measured by; reach: how many of it are allowed, (1,).
    """
    norm = (squares.square().sum() if alone else squares).sqrt().clamp(max=LARGEST).float()
    first = torch.linalg.vector_norm(own) * reach[0]
    most = torch.where(before > 0.0, before * limit, first)
    longer = norm > most
    factors.mul_(torch.where(longer, most / norm, 1.0))
    kept = torch.minimum(norm, torch.where(longer, most, norm))
    new.copy_(torch.where(ok & (norm > 0.0), kept, before))


def _note_norms(rows: Tensor, norms: Tensor) -> None:
    norms.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))


@dataclass(frozen=True)
class ScaledGradient(ScaledRest):
    """Step by the whole gradient, scaled like that, and by nothing else (APOLLO, arXiv 2412.05270).

    The subspace is a sketch that serves statistics alone: nothing is lifted.
    """

    lifts: ClassVar[bool] = False


@dataclass(frozen=True)
class SubsetNormed(Residual):
    """Step by the rest and what is seen, both over the norms of channels (AdamSNSM, arXiv 2411.07120).

        v_i <- beta2 v_i + (1 - beta2) sum of g^2 over channel i
        d = (scale up(N) + rest) / (1 - beta1^t) / (sqrt(v_i / (1 - beta2^t)) + eps)

    A dense basis spreads an element of the gradient over its channel: a column where it spans the rows, a
    row where it spans the columns. So a channel is what shares a norm: over subsets that cut through it a
    large element would move weights by as much as it is larger than their own. The released code lets one
    choose such; by default it has the indices of the long side, which are the channels of a basis that
    spans the short one, and so are those here beside a projector that spreads nothing.

    N must be in units of the gradient; published with a momentum without bias correction (that of
    `AverageGradient`), since the sum is corrected. Holds 4 l + 4 bytes for l channels.
    """

    lifts: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"orthonormal"})
    needs_linear: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"betas", "eps"})

    def init(self, x: Tensor, axis: int | None = None) -> State:
        """A second moment of zero, age 0."""
        age = torch.zeros((), dtype=torch.int32, device=x.device)
        return {"exp_avg_sq": _channels(axis).init(x), "age": age}

    def shards(self, shape: Shape) -> bool:
        """Always: what a channel has on other ranks is summed."""
        return True

    def absorb(self, s: State, split: Split) -> tuple[Blocks | None, Commit | None]:
        """The whole step, but no step of a channel whose sum has no fp32.

        Its moment counts the largest sum there is, for N has seen its elements; where some may be unseen and
        not finite, it stays as it is.
        """
        age, subsets = s["age"] + split.ok, _channels(split.axis if split.sees else None)
        numbers = numbers_of(subsets, age, split.hp)
        sums, old = subsets.sums(split.g, split.hp), s["exp_avg_sq"]
        v, over = torch.empty_like(old), torch.empty_like(old)
        split.hp.reckon(_note_moment, (v, over, old, sums, numbers, split.ok), (split.sees,))
        step = subsets.divided(split.with_rest(split.rest), over, numbers)
        return step, lambda: apply_in_place(s, {"exp_avg_sq": v, "age": age})


def _channels(axis: int | None) -> Subsets:
    """Those of a dense basis that spans an axis; the long side's indices beside another."""
    return Subsets(by_column=None if axis is None else axis == 0)


def _note_moment(
    v: Tensor, over: Tensor, old: Tensor, sums: Tensor, numbers: Tensor, ok: Tensor, sees: bool
) -> None:
    """The moment of each subset, and what its step is over: infinity for none."""
    sound = sums <= LARGEST_MEAN
    moved = old + numbers[0] * (sums.clamp(max=LARGEST_MEAN) - old)
    v.copy_(torch.where(ok if sees else ok & sound, moved, old))
    over.copy_(torch.where(sound, v, math.inf))
