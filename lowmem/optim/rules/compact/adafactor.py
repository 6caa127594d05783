"""Adafactor: Adam's denominator from row and column means (arXiv 1804.04235).

    V <- V + t^-0.8 (G^2 + eps1 - V), held by its row and column means
    U = G / sqrt(V),   U <- U / max(1, rms(U) / clip_threshold)
    alpha = lr, or max(eps2, rms(W)) lr, or less by a schedule of its own
    M <- beta1 M + (1 - beta1) alpha U  (if beta1 > 0)
    W <- (1 - alpha weight_decay) W - (M or alpha U)

This is transformers' Adafactor, in passes over row blocks: one for the means,
one for rms(U) (it cannot be had from the means), one for the write. Nothing of
the weight's size is allocated. Three things are decided here:

* A tensor of three dimensions or more is the matrix of its first dimension by
  the rest. transformers takes the last two and holds a pair of vectors for each
  of the others, for a convolution of 3 x 3 kernels two thirds of a full moment.
* transformers' `relative_step` has no learning rate. Here lr is its largest
  value, and `warmup` the steps until it is reached: lr = 1e-2 is transformers',
  with warmup = 10000 its `warmup_init`. Schedulers and lr = 0 keep their meaning.
* betas and eps of the parameter group are AdamW's and not used, as in transformers:
  beta2 follows from t, and beta1, eps1 and eps2 are set where buffers are decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import BLOCK, Blocks, Dense, Direction
from lowmem.optim.codecs.factored import Factored, RowCol
from lowmem.optim.contract import Rule
from lowmem.optim.elementwise import Coded, coded
from lowmem.optim.engine.ages import numbers_of, table
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.elementwise.moments import Momentum, Square
from lowmem.optim.shards import Shape, total, whole
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed


def _times(rows: Tensor, q: Tensor) -> Tensor:
    return rows * q


def between(rows: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """diag(p) rows diag(q)."""
    return (rows * q).mul_(p)


def _note_norms(rows: Tensor, norms: Tensor) -> None:
    norms.copy_(_norms(rows))


def _norms(rows: Tensor) -> Tensor:
    """Row by row, which is more exact than at once, and contiguous: another layout gives the same bits."""
    norms: Tensor = torch.linalg.vector_norm(rows.contiguous(), dim=1)
    return norms


def _shrink(squares: Tensor, shape: tuple[int, int], most: float, hp: Hyper) -> Tensor:
    """min(1, most / rms(U)), from the sum of U^2 over the rows held here."""
    m, n = whole(shape)
    mean = hp.total(squares) * (1.0 / (m * n) / most**2)
    return mean.rsqrt_().clamp_(max=1.0)


def quotient(g: Blocks, p: Tensor, q: Tensor, most: float, hp: Hyper) -> Blocks:
    """U = diag(p) G diag(q), shortened to an rms of `most`; takes a pass over G, and uses p up."""
    norms, rest = torch.empty_like(p), _kept(Formula(_times, (g,), across=(q,)))
    hp.sweep(_note_norms, rest, (norms,))
    if hp.shard is None:
        hp.reckon(_shorten_, (p, norms), (1.0 / (g.shape[0] * g.shape[1]) / most**2,))
    else:
        norms.mul_(p)
        p.mul_(_shrink(torch.dot(norms, norms), g.shape, most, hp))
    if isinstance(rest, Dense):
        rest.tensor.mul_(p[:, None])
        return rest
    return Formula(between, (g,), (p,), (q,))


def _shorten_(p: Tensor, norms: Tensor, share: float) -> None:
    norms = norms * p
    p.mul_((torch.dot(norms, norms) * share).rsqrt_().clamp_(max=1.0))


def _kept(x: Blocks) -> Blocks:
    """A matrix that one row block is all of, made once instead of at every look; others as they are."""
    m, n = x.shape
    return Dense(x.rows(0, m), shape=x.shape) if sizes(x.device).at_hand and m * n <= BLOCK else x


class Alone:
    """What a factored moment asks of a step whose rows are all here."""

    shard: ClassVar[None] = None

    @staticmethod
    def total(x: Tensor, op: str = "sum") -> Tensor:
        """Of one."""
        return x


@dataclass(frozen=True)
class _Followed:
    """A factored moment moves where what is new is sound, and the roots of what is held then are found."""

    factored: Factored

    def __call__(
        self, row: Tensor, col: Tensor, new_row: Tensor, new_col: Tensor, age: Tensor, p: Tensor, q: Tensor,
        ok: Tensor, rates: Tensor,
    ) -> None:  # fmt: skip
        alone = cast("Hyper", Alone)
        held, new = {"row": row, "col": col}, {"row": new_row, "col": new_col}
        sound = self.factored.sound(new, alone)
        age.add_(sound)
        rate = rates.index_select(0, age.view(1))[0, 0]
        self.factored.average_(held, new, rate, sound)
        for found, root in zip((p, q), self.factored.roots(held, alone), strict=True):
            found.copy_(root)
        ok.copy_(sound)


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor over a factored second moment (see the module's docstring).

    Bytes for an (m, n) weight: 4 (m + n) + 4, and what the codec takes for m n elements
    if there is a momentum; for a vector what the codec takes, and 4. Workspace of a
    vector: its fp32 copy.

    Args:
        square: the full second moment of vectors; its rate and eps are those of matrices too.
        momentum: the average of steps, or None.
        factored: how the second moment of matrices is held.
        clip_threshold: largest rms of U, above 0.
        scale_parameter: steps in units of the weight's rms.
        eps2: least rms that counts, at least 0.
        relative_step: steps of at most 1 / sqrt(t).
        warmup: steps until a relative step may reach lr; 0 for none.

    Example:
        >>> {k: tuple(v.shape) for k, v in Adafactor.of("fp32").init(torch.zeros(3, 5)).items()}
        {'square.row': (3,), 'square.col': (5,), 'age': ()}
    """

    square: Coded
    momentum: Coded | None = None
    factored: Factored = field(default_factory=RowCol)
    clip_threshold: float = 1.0
    scale_parameter: bool = False
    eps2: float = 1e-3
    relative_step: bool = False
    warmup: int = 0

    @classmethod
    def of(
        cls, states: str, *, beta1: float = 0.0, decay_rate: float = -0.8, eps1: float = 1e-30,
        clip_threshold: float = 1.0, scale_parameter: bool = False, eps2: float = 1e-3,
        relative_step: bool = False, warmup: int = 0, floor: float = 0.0,
    ) -> Adafactor:  # fmt: skip
        """Adafactor from plain numbers; `states` holds the momentum and the moments of vectors.

        `floor` is that of `RowCol`, for use inside a subspace.

        Raises:
            UserError: a number outside its range, or one that nothing would read.
        """
        bad = {
            f"beta1 must be in [0, 1), got {beta1}": not 0.0 <= beta1 < 1.0,
            f"decay_rate must be below 0, got {decay_rate}": not decay_rate < 0.0,
            f"eps1 must be at least 0, got {eps1}": not eps1 >= 0.0,
            f"eps2 must be at least 0, got {eps2}": not eps2 >= 0.0,
            f"clip_threshold must be above 0, got {clip_threshold}": not clip_threshold > 0.0,
            f"warmup must be at least 0, got {warmup}": warmup < 0,
            f"warmup={warmup} needs relative_step=true": warmup > 0 and not relative_step,
            f"eps2={eps2} needs scale_parameter=true": eps2 != 1e-3 and not scale_parameter,
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))
        square = coded(Square(decay_rate, eps1), states)
        momentum = coded(Momentum(beta1), states) if beta1 else None
        return cls(
            square, momentum, RowCol(floor), clip_threshold, scale_parameter, eps2, relative_step, warmup
        )

    def init(self, x: Tensor) -> State:
        """All moments zero, age 0."""
        square = self.square.init(x) if x.dim() < 2 else prefixed("square", self.factored.init(x))
        average = self.momentum.init(x) if self.momentum else {}
        return square | average | {"age": torch.zeros((), dtype=torch.int32, device=x.device)}

    @property
    def paced(self) -> str:
        """The option that counts steps by the age of moments."""
        return "relative_step" if self.relative_step else ""

    @property
    def uses(self) -> frozenset[str]:
        """Neither: beta2 follows from t, and beta1, eps1 and eps2 are set where buffers are decided."""
        return frozenset()

    @property
    def own_decay(self) -> bool:
        """In proportion to the weight's rms, as the step is."""
        return self.scale_parameter

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """Tables of the codecs that hold something of this shape."""
        square = self.square.constants(shape) if len(shape) < 2 else {}
        return {**square, **(self.momentum.constants(shape) if self.momentum else {})}

    def shards(self, shape: Shape) -> bool:
        """Where the momentum does; columns are averaged over all rows."""
        return self.momentum is None or self.momentum.shards(shape)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Divide by the root of the second moment, clip, find the step size."""
        find = self._vector if "square.row" not in s else self._matrix
        blocks, ok = find(g, s, hp)
        own = self.scale_parameter or self.relative_step
        alpha = self._alpha(s, hp) if own else None
        if self.momentum is None:
            decay = None if alpha is None else 1.0 - hp.weight_decay * alpha
            return Direction(blocks, lr=alpha, decay=decay, ok=ok)
        rate = hp.rate if alpha is None else alpha
        held = {key: s[key] for key in sorted(s) if not key.startswith("square") and key != "age"}
        then = (self.momentum, {**held, "rate": rate})
        return Direction(blocks, lr=hp.vector(1.0)[0], decay=1.0 - hp.weight_decay * rate, ok=ok, then=then)

    def _matrix(self, g: Blocks, s: State, hp: Hyper) -> tuple[Blocks, Tensor]:
        """U of a matrix, row block by row block; two passes over G, and one when U is read."""
        held = part(s, "square")
        rule = cast("Square", self.square.rule)
        new = self.factored.reduce(g, rule.eps, hp)
        if hp.shard is None and not sizes(g.device).at_hand:
            p, q = (torch.empty_like(held[key]) for key in ("row", "col"))
            ok = torch.empty((), dtype=torch.bool, device=g.device)
            seen = (held["row"], held["col"], new["row"], new["col"])
            hp.reckon(_Followed(self.factored), (*seen, s["age"], p, q, ok, table(rule, hp, g.device)))
            return quotient(g, p, q, self.clip_threshold, hp), ok
        ok = self.factored.sound(new, hp)
        s["age"].add_(ok)
        self.factored.average_(held, new, numbers_of(rule, s["age"], hp)[0], ok)
        return quotient(g, *self.factored.roots(held, hp), self.clip_threshold, hp), ok

    def _vector(self, g: Blocks, s: State, hp: Hyper) -> tuple[Blocks, Tensor]:
        """U of a vector; its second moment is held in full."""
        u = g.rows(0, 1).clone(memory_format=torch.contiguous_format)
        ok = torch.isfinite(hp.total(u.abs().amax(), "max").square())
        held = {key: s[key] for key in sorted(s) if not key.startswith("momentum")}
        hp.advance(self.square, u, held, hp, ok)
        return Dense(u, _shrink(torch.dot(u[0], u[0]), g.shape, self.clip_threshold, hp)), ok

    def _alpha(self, s: State, hp: Hyper) -> Tensor:
        """The step size, 0-D float64."""
        alpha = hp.rate
        if self.relative_step:
            age = s["age"].double()
            least = torch.minimum(alpha, age.rsqrt())
            alpha = torch.minimum(least, alpha * age / self.warmup) if self.warmup else least
        if not self.scale_parameter:
            return alpha
        (m, n), shape = whole(hp.weight.shape), hp.weight.shape  # spread, even where the gradient is not
        norms = torch.empty(hp.weight.shape[0], device=hp.weight.device)
        hp.sweep(_note_norms, hp.weight, (norms,))
        squares = norms.double().square().sum()
        return alpha * total(shape, squares * (1.0 / (m * n))).sqrt().clamp(min=self.eps2)

    def check_rebase(self, kind: str) -> None:
        """Means over rows and columns do not determine those in another basis."""
        if kind in ("permute", "rotate"):
            raise UserError(
                "on_refresh='rotate' is not defined for row and column means; take 'reset' or 'keep'"
            )
