"""Rules that go by a few numbers of a whole tensor, made of norms of its gradients.

    SGDSaI      momentum at a rate found once, at the first gradient
    NovoGrad    momentum at a rate that is an average of squared norms
    StableSPAM  Adam on gradients whose largest elements and norm follow their own averages

Passes over the gradient find its sums in double precision, where no square of an fp32
number overflows or vanishes; the moments move while the step is written. A gradient of
zeros decides nothing: the number is found at the first that has something to say. A
tensor in which one element is not finite takes no step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import Rule
from lowmem.optim.elementwise import Coded, coded
from lowmem.optim.formulas import Formula
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Average, Sum
from lowmem.optim.shards import Shape, whole
from lowmem.optim.terms.changes import Change
from lowmem.optim.terms.fp32 import LARGEST_MOMENT, LEAST_EPS
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State

LEAST_SPREAD = 1e-12
"""A variance below this share of the mean square is that of equal elements."""


@dataclass(frozen=True)
class Layerwise(Rule):
    """What both rules are: a momentum and one fp32 number. Bytes: what the codec takes, and 4.

    Args:
        momentum: how it moves and is held.
    """

    momentum: Coded
    number: ClassVar[str] = ""

    def init(self, x: Tensor) -> State:
        """A momentum of zero, and a number that is not found yet."""
        return {**self.momentum.init(x), self.number: torch.zeros((), device=x.device)}

    def shards(self, shape: Shape) -> bool:
        """Where the momentum does."""
        return self.momentum.shards(shape)

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return self.momentum.constants(shape)

    def moving(self, g: Blocks, s: State, ok: Tensor, **given: Tensor) -> Direction:
        """The step of the momentum, which moves while it is written."""
        held = {key: s[key] for key in sorted(s) if key != self.number}
        return Direction(g, ok=ok, then=(self.momentum, {**held, **given}))


def sums(g: Blocks, hp: Hyper) -> Tensor:
    """The sum of the elements and that of their squares, (2,) float64."""
    return hp.total(hp.parts(_both, g, count=2).sum(0))


def _both(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return torch.stack((rows.sum(dtype=torch.float64), norms.square().sum()))


@dataclass(frozen=True)
class SGDSaI(Layerwise):
    """Momentum, scaled for good by the signal-to-noise ratio of the first gradient (arXiv 2412.11768).

        k = |G| / (std(G) + eps)  at the first gradient,  M = G at first, then M + (1 - momentum)(G - M)
        D = k M

    k is about the root of the number of elements. Equal elements have no spread: the paper divides
    by eps, here k is that root. Published code finds k anew after a resume; here it is in the state.
    Bytes for an (m, n) weight in fp32: 4 m n + 4.

    Args:
        share: of the old momentum, in [0, 1).

    Example:
        >>> sorted(SGDSaI.of("fp32").init(torch.zeros(3, 5)))
        ['momentum', 'scale']
    """

    momentum: Coded = field(default_factory=lambda: coded(Average()))
    share: float = 0.9
    number: ClassVar[str] = "scale"

    @classmethod
    def of(cls, states: str, *, momentum: float = 0.9) -> SGDSaI:
        """SGD-SaI with its momentum held as `states` says.

        Raises:
            UserError: a momentum outside [0, 1).
        """
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"momentum must be in [0, 1), got {momentum}")
        return cls(coded(Average(), states), momentum)

    @property
    def uses(self) -> frozenset[str]:
        """What is added to the spread."""
        return frozenset({"eps"})

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the scale, if it is not found yet."""
        found = sums(g, hp)
        known, ok = s["scale"] > 0.0, found[1].isfinite()
        scale = torch.where(known, s["scale"], self._scale(found, g, hp))
        s["scale"].copy_(torch.where(ok, scale, s["scale"]))
        share = torch.where(known, 1.0 - self.share, 1.0)
        return self.moving(g, s, ok, share=share, rate=s["scale"].clone())

    def _scale(self, found: Tensor, g: Blocks, hp: Hyper) -> Tensor:
        """k, 0-D fp32."""
        m, n = whole(g.shape)
        count = float(m * n)
        total, squares = found.unbind()
        variance = (squares - total.square() / count) / max(1.0, count - 1)
        equal = variance <= LEAST_SPREAD * squares / count
        k = squares.sqrt() / (variance.clamp(min=0.0).sqrt() + hp.eps)
        return torch.where(equal, torch.where(squares > 0.0, count**0.5, 0.0), k).float()


@dataclass(frozen=True)
class NovoGrad(Layerwise):
    """Momentum of gradients, each over an average norm of its tensor (arXiv 1905.11286).

        v <- beta2 v + (1 - beta2) |G|^2,  |G|^2 at first
        M <- beta1 M + c G / (sqrt(v) + eps),  c = 1, or 1 - beta1 with averaging
        D = M

    The paper takes betas (0.95, 0.98). Without averaging a step is 1 / (1 - beta1) gradients long: take
    lr as much smaller. The decay is decoupled, where the paper's goes through M: M does not depend on
    the weight, and works in a subspace. Bytes for an (m, n) weight in fp32: 4 m n + 4.

    Args:
        averaging: make M an average instead of a sum.

    Example:
        >>> sorted(NovoGrad.of("int8").init(torch.zeros(3, 5)))
        ['exp_avg_sq', 'momentum.codes', 'momentum.scale']
    """

    momentum: Coded = field(default_factory=lambda: coded(Sum()))
    averaging: bool = False
    number: ClassVar[str] = "exp_avg_sq"

    @classmethod
    def of(cls, states: str, *, averaging: bool = False) -> NovoGrad:
        """NovoGrad with its momentum held as `states` says."""
        return cls(coded(Sum(), states), averaging)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Move the average of squared norms."""
        beta1, beta2 = hp.betas
        squares = sums(g, hp)[1]
        v, ok = s["exp_avg_sq"].double(), squares <= LARGEST_MOMENT
        v = torch.where(v > 0.0, beta2 * v + (1.0 - beta2) * squares, squares)
        s["exp_avg_sq"].copy_(torch.where(ok, v, s["exp_avg_sq"]))
        share = 1.0 - beta1 if self.averaging else 1.0
        rate = share / (v.sqrt() + max(hp.eps, LEAST_EPS))
        return self.moving(g, s, ok, rate=rate.float())


@dataclass(frozen=True)
class StableSPAM(Rule):
    """Adam on gradients that are measured by their own history (arXiv 2502.17055).

        x <- theta x + (1 - theta) max|G|,  X = x / (1 - theta^t);  where |g| > X: g <- g X / max|G|
        a <- gamma1 a + (1 - gamma1) |G|,  b <- gamma2 b + (1 - gamma2) |G|^2,  the norm of what is clipped
        G <- (G / |G|) (a / (1 - gamma1^t)) / (sqrt(b / (1 - gamma2^t)) + eps),  D = Adam(G)

    t counts what x, a and b have seen, and outlives a reset of the moments, where the released code
    divides old averages by the correction of new ones. Two passes over the gradient find its numbers.
    Bytes for an (m, n) weight in fp32: 8 m n + 32.

    Args:
        adam: the rule of the moments, and how they are held.
        gammas: shares of the old averages of the norm and of its square; theta: of the largest element.

    Raises:
        UserError: a share outside [0, 1).

    Example:
        >>> sorted(StableSPAM.of("fp32").init(torch.zeros(3, 5)))
        ['age', 'exp_avg', 'exp_avg_sq', 'numbers', 'seen']
    """

    adam: Coded = field(default_factory=lambda: coded(Adam()))
    gammas: tuple[float, float] = (0.7, 0.9)
    theta: float = 0.999

    @classmethod
    def of(cls, states: str, *, gamma1: float = 0.7, gamma2: float = 0.9, theta: float = 0.999) -> StableSPAM:
        """Stable-SPAM with its moments held as `states` says."""
        return cls(coded(Adam(), states), (gamma1, gamma2), theta)

    def __post_init__(self) -> None:
        shares = (*self.gammas, self.theta)
        if not all(0.0 <= share < 1.0 for share in shares):
            raise UserError(f"gamma1, gamma2 and theta must be in [0, 1), got {shares}")

    def init(self, x: Tensor) -> State:
        """Adam's state; x, a and b, in double precision, for |G|^2 may have no fp32; and t."""
        numbers = torch.zeros(3, dtype=torch.float64, device=x.device)
        return {**self.adam.init(x), "numbers": numbers, "seen": numbers.new_zeros((), dtype=torch.int32)}

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codecs' tables."""
        return self.adam.constants(shape)

    def check_rebase(self, kind: str) -> None:
        """As for Adam, whose age is that of the tensor here; norms and largest elements are kept."""
        if kind == "permute":
            raise UserError(
                "on_refresh='rotate' is not defined for stable_spam where columns come and go; "
                "take 'keep' or 'reset'"
            )
        self.adam.check_rebase(kind)

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Adam's moments alone."""
        self.adam.rebase_(s, change, shape, hp)

    def shards(self, shape: Shape) -> bool:
        """Where the moments do: its numbers are of all rows."""
        return self.adam.shards(shape)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Clip, normalise, and let Adam step while it is written."""
        largest = hp.peak(g)
        ok = largest.isfinite()
        age = (s["seen"] + 1).double()
        most = self.theta * s["numbers"][0] + (1.0 - self.theta) * largest.double()
        limit = (most / (1.0 - self.theta**age)).float()
        shrink = torch.where(largest > limit, limit / largest, 1.0)
        clipped = Formula(_clipped, (g,), across=(limit, shrink))
        norm = hp.total(hp.parts(_squares, clipped).sum()).sqrt()
        shares = hp.vector(*self.gammas)
        means = shares * s["numbers"][1:] + (1.0 - shares) * torch.stack((norm, norm.square()))
        mean, square = (means / (1.0 - shares**age)).unbind()
        target = mean / (square.sqrt() + max(hp.eps, LEAST_EPS))
        scale = torch.where(norm > 0.0, target / norm, 0.0).float()
        new = torch.cat((most.view(1), means))
        s["numbers"].copy_(torch.where(ok, new, s["numbers"]))
        s["seen"].add_(ok)
        held = {key: s[key] for key in sorted(s) if key not in ("numbers", "seen")}
        step = Formula(torch.mul, (clipped,), across=(scale,))
        return Direction(step, ok=ok, then=(self.adam, held))


def _clipped(rows: Tensor, limit: Tensor, shrink: Tensor) -> Tensor:
    return torch.where(rows.abs() > limit, rows * shrink, rows)


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square().sum()
