"""Rules without a rate of their own: it follows from the weights and, where the paper says so, all of them.

    LDoG   how far a tensor has come over the gradients that it has seen
    DoG    the same of the model
    MoMo   momentum, or Adam, no farther than to where a model of the loss is at its least

What is summed over the model is found before its first tensor steps (`Asks.terms`), in double
precision. Every tensor holds a copy of the numbers that all share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Dense, Direction
from lowmem.optim.contract import Rule
from lowmem.optim.elementwise import Coded, coded
from lowmem.optim.engine.ages import numbers_of
from lowmem.optim.formulas import Formula
from lowmem.optim.held import HeldMoment
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Average
from lowmem.optim.rules.measured.measured import squares, total
from lowmem.optim.rules.measured.weighed import LEAST_SQUARE
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part


@dataclass(frozen=True)
class LDoG(Rule):
    """Descent at a rate of distance over gradients, tensor by tensor (arXiv 2302.12022, its L-DoG).

        H = G + wd W;  r <- max(r, |W - W_0|),  reps_rel (1 + |W_0|) at first;  s <- s + |H|^2
        W <- W - lr r / sqrt(s) H

    lr is a factor: leave it at 1, without a schedule. Decay is part of the gradient, as published. Nothing
    begins before the first one that is not zero. The paper evaluates an average of iterates.
    Bytes for an (m, n) weight: its copy in its own precision, fp32 at most, and 16.

    Args:
        reps_rel: the first distance, in units of the weight's length, above 0.

    Raises:
        UserError: a distance of 0 or less.

    Example:
        >>> sorted(LDoG().init(torch.zeros(3, 5)))
        ['distance', 'initial', 'squares']
    """

    reps_rel: float = 1e-6
    reads_weight: ClassVar[bool] = True
    own_decay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.reps_rel > 0.0:
            raise UserError(f"dog: reps_rel is above 0, got {self.reps_rel}")

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def init(self, x: Tensor) -> State:
        """A place for the first weight, and both numbers."""
        dtype = x.dtype if x.dtype.itemsize < 4 else torch.float32
        numbers = {
            key: torch.zeros((), dtype=torch.float64, device=x.device) for key in ("distance", "squares")
        }
        return {"initial": torch.zeros(x.shape, dtype=dtype, device=x.device), **numbers}

    def terms(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """Squared norms: of the gradient with the decay, of the weight, of the way."""
        of = (self._decayed(g, hp), hp.weight, Dense(s["initial"], shape=g.shape))
        square, length, way = total(_lengths, of, hp, count=3)
        return torch.stack((square, length, torch.where(s["squares"] > 0.0, way, 0.0)))

    def heard(self, g: Blocks, s: State, hp: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, squares and distance so far, and whether the step is taken."""
        terms = self.terms(g, s, hp)
        return terms, torch.stack((s["squares"], s["distance"])), terms.isfinite().all()

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move both numbers; remember the weight until there is a gradient to begin with."""
        (square, length, way), (before, distance), ok = self.heard(g, s, hp)
        hp.sweep(_remember, hp.weight, (s["initial"].view(g.shape),), (s["squares"] > 0.0,))
        first = self.reps_rel * (1.0 + length.sqrt())
        distance = torch.where(before > 0.0, torch.maximum(distance, way.sqrt()), first)
        s["distance"].copy_(torch.where(ok, distance, s["distance"]))
        s["squares"].copy_(torch.where(ok, before + square, s["squares"]))
        rate = torch.where(
            s["squares"] > 0.0, s["distance"] / s["squares"].sqrt().clamp(min=LEAST_SQUARE), 0.0
        )
        return Direction(self._decayed(g, hp), lr=hp.lr * rate, decay=hp.vector(1.0)[0], ok=ok)

    @staticmethod
    def _decayed(g: Blocks, hp: Hyper) -> Blocks:
        """H."""
        return Formula(_Decayed(hp.weight_decay), (g, hp.weight)) if hp.weight_decay else g


@dataclass(frozen=True)
class _Decayed:
    """A gradient with the decay."""

    weight_decay: float

    def __call__(self, g: Tensor, w: Tensor) -> Tensor:
        return g + self.weight_decay * w


def _lengths(g: Tensor, w: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """The squares of a gradient, of the weight, and of the way."""
    return squares(g, w, w - start)


def _remember(w: Tensor, held: Tensor, own: Tensor) -> None:
    held.copy_(torch.where(own, held, w.to(held.dtype)))


@dataclass(frozen=True)
class DoG(LDoG):
    """Descent at a rate of distance over gradients, both of the model as one (arXiv 2302.12022).

        H = G + wd W;  r <- max(r, |w - w_0|),  reps_rel (1 + |w_0|) at first;  s <- s + |h|^2
        W <- W - lr r / sqrt(s) H,   w and h of all tensors that have a gradient

    A tensor whose gradient is not finite adds nothing and takes no step. Otherwise as `LDoG`.
    Bytes for an (m, n) weight: its copy in its own precision, fp32 at most, and 16.

    Args:
        reps_rel: the first distance, in units of the model's length, above 0.

    Raises:
        UserError: a distance of 0 or less; one tensor is stepped alone.

    Example:
        >>> DoG().joint
        ('squares', 'distance')
    """

    joint: ClassVar[tuple[str, ...]] = ("squares", "distance")

    def heard(self, g: Blocks, s: State, hp: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the model."""
        sums, held, ok = self.known(hp)
        return sums.to(g.device), held.to(g.device), ok


def _along(g: Tensor, w: Tensor, old: Tensor, share: Tensor) -> tuple[Tensor, ...]:
    """<g, w>, <m, w> and <m, m>, of the average after g."""
    m = old + share * (g - old)
    return g.double() * w, m.double() * w, m.double().square()


def _adapted(
    g: Tensor, w: Tensor, old: Tensor, v: Tensor, share: Tensor, rate: Tensor, eps: Tensor, correction: Tensor
) -> tuple[Tensor, ...]:
    """The same with <m, m / D>."""
    product, along, length = _along(g, w, old, share)
    root = torch.addcmul(eps, (v + rate * (g.square() - v)).sqrt(), correction)
    return product, along, length / root.double()


@dataclass(frozen=True)
class MoMo(Rule):
    """Momentum whose rate a model of the loss bounds (arXiv 2305.07583), or Adam with it.

        M <- M + c (G - M),  f <- f + c (loss - f),  p <- p + c (<g, w> - p),  c = 1 - beta1, 1 at first
        S = 1 + lr wd;  t = min(lr, max(S (f - least) + <m, w> - S p, 0) / |m|^2)
        W <- (W - t M) / S,   products and norm over all tensors

    Adaptive: c = 1 - beta1 always, b = 1 - beta1^age, D = sqrt(v_hat) + eps, `b least` for least, lr / b
    for lr, <m, m / D> for |m|^2, and M / D for the step. lr is the most there is: cross-entropy is far above
    its least, so Adam's own steps are taken until they would go too far.
    Bytes for an (m, n) weight in fp32: 4 m n + 24, adaptive 8 m n + 28.

    Args:
        held: the average, and how it is held; adaptive: whether that is Adam's.
        least: what the loss cannot fall below.

    Example:
        >>> sorted(MoMo.of("fp32").init(torch.zeros(3, 5)))
        ['loss', 'momentum', 'product', 'seen']
    """

    held: Coded = field(default_factory=lambda: coded(Average()))
    adaptive: bool = False
    least: float = 0.0
    reads_weight: ClassVar[bool] = True
    own_decay: ClassVar[bool] = True
    reads_later: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True
    joint: ClassVar[tuple[str, ...]] = ("seen", "loss", "product")

    @classmethod
    def of(cls, states: str, *, adaptive: bool = False, least: float = 0.0) -> MoMo:
        """MoMo, or MoMo-Adam, with its moments held as `states` says."""
        return cls(coded(Adam() if adaptive else Average(), states), adaptive, least)

    @property
    def uses(self) -> frozenset[str]:
        """Adam's, or the betas alone."""
        return frozenset({"betas", *self.held.uses})

    def init(self, x: Tensor) -> State:
        """The moments; steps seen, and the averages of loss and product."""
        numbers = {key: torch.zeros((), dtype=torch.float64, device=x.device) for key in self.joint}
        return {**self.held.init(x), **numbers}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return self.held.constants(shape)

    def _share(self, seen: Tensor, hp: Hyper) -> Tensor:
        """c, 0-D."""
        share = torch.full_like(seen, 1.0 - hp.betas[0])
        return share if self.adaptive else torch.where(seen > 0.0, share, 1.0)

    def _moment(self, name: str, g: Blocks, s: State, hp: Hyper) -> HeldMoment:
        codec = dict(zip(self.held.rule.moments, self.held.codecs, strict=True))[name]
        return HeldMoment(codec, part(s, name), s, g.shape, hp)

    def terms(self, g: Blocks, s: State, hp: Hyper) -> Tensor:
        """<g, w>, <m, w> and <m, m / D>, of the average after g."""
        share = self._share(s["seen"], hp).float()
        first = self._moment(next(iter(self.held.rule.moments)), g, s, hp)
        if not self.adaptive:
            return torch.stack(total(_along, (g, hp.weight, first), hp, share, count=3))
        _, rate, eps, _, correction = numbers_of(self.held.rule, s["age"] + 1, hp)
        of = (g, hp.weight, first, self._moment("exp_avg_sq", g, s, hp))
        return torch.stack(total(_adapted, of, hp, share, rate, eps, correction, count=3))

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move the averages of loss and product, and find the rate."""
        sums, numbers, ok = (x.to(g.device) for x in self.known(hp))
        loss = torch.zeros_like(sums[0]) if hp.overall is None or hp.overall.loss is None else hp.overall.loss
        (product, along, length), (seen, f, p) = sums, numbers
        share, ok = self._share(seen, hp), ok & loss.isfinite()
        f, p = f + share * (loss.to(f.device) - f), p + share * (product - p)
        bias = 1.0 - hp.betas[0] ** (seen + 1.0) if self.adaptive else torch.ones_like(seen)
        size = 1.0 + hp.lr * hp.weight_decay
        above = (size * (f - bias * self.least) + along - size * p).clamp(min=0.0)
        most = hp.lr / bias
        rate = torch.where(length > 0.0, torch.minimum(most, above / length.clamp(min=LEAST_SQUARE)), most)
        own = self._share(s["seen"], hp).float()
        for key, new in zip(self.joint, (seen + 1.0, f, p), strict=True):
            s[key].copy_(torch.where(ok, new, s[key]))
        state = {key: s[key] for key in sorted(s) if key not in self.joint}
        given = {} if self.adaptive else {"share": own, "rate": torch.ones_like(own)}
        rate, decay = torch.where(ok, rate, 0.0), torch.where(ok, 1.0 / size, torch.ones_like(rate))
        # Adam's step is of the average without its bias
        return Direction(g, lr=rate * bias / size, decay=decay, ok=ok, then=(self.held, {**state, **given}))
