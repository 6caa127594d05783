"""Adam with another second moment, or another order of the two: AMSGrad, AdaBelief, LaProp, NAdam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.terms.fp32 import LEAST_EPS
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class AMSGrad(Adam):
    """Adam divided by the largest second moment so far (arXiv 1904.09237), corrected as torch does.

        m, v as Adam;  M <- max(M, v);  d = m / (1 - beta1^t) / (sqrt(M / (1 - beta2^t)) + eps)

    The largest moment is held in fp32: rounded up once, it would never come down again.
    Bytes for an (m, n) weight in fp32: 12 m n + 4.

    Example:
        >>> sorted(AMSGrad.moments)
        ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']
    """

    moments: ClassVar[Mapping[str, Moment]] = {
        **Adam.moments,
        "max_exp_avg_sq": Moment(signed=False, states="fp32"),
    }
    rotated = Elementwise.rotated  # a maximum has no meaning in another basis

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Adam's averages, and the maximum."""
        moved = super().move(g, m, x)
        return {**moved, "max_exp_avg_sq": torch.maximum(m["max_exp_avg_sq"], moved["exp_avg_sq"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        _, _, eps, correction1, correction2 = x.numbers
        return (m["exp_avg"] * correction1) / (m.root("max_exp_avg_sq") * correction2 + eps)


@dataclass(frozen=True)
class AdaBelief(Elementwise):
    """Adam divided by how far gradients lie from their average (arXiv 2010.07468).

        m <- m + (1 - beta1)(g - m),  s <- s + (1 - beta2)((g - m)^2 - s) + eps
        d = m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps)

    eps plays the part of Adam's squared: take 1e-16. With `rectify` the first steps are plain momentum
    until the variance is known (arXiv 1908.03265), as the published package does by default.
    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        rectify: whether to.

    Example:
        >>> sorted(AdaBelief.moments)
        ['exp_avg', 'exp_avg_var']
    """

    rectify: bool = False
    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "exp_avg_var": Moment(signed=False)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Rates, eps, what m is multiplied by, the root, and whether there is a root."""
        beta1, beta2 = hp.betas
        first, root, plain = 1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5, 0.0
        if self.rectify:
            most = 2.0 / (1.0 - beta2) - 1.0
            known = most - 2.0 * t * beta2**t / (1.0 - beta2**t)
            root, plain = 1.0, float(known < 5.0)
            if not plain:
                ratio = (known - 4.0) / (most - 4.0) * (known - 2.0) / known * most / (most - 2.0)
                first *= ((1.0 - beta2**t) * ratio) ** 0.5
        return 1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS), first, root, plain

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The average, then the spread around the new one."""
        rate1, rate2, eps = x.numbers[:3]
        first, second = m["exp_avg"], m["exp_avg_var"]
        first = torch.addcmul(first, g - first, rate1)
        apart = g - first
        return {
            "exp_avg": first,
            "exp_avg_var": torch.addcmul(second, apart * apart - second, rate2) + eps,
        }

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient, or the average alone."""
        _, _, eps, first, root, plain = x.numbers
        divisor = m.root("exp_avg_var") * root + eps
        return m["exp_avg"] * first / torch.where(plain > 0.0, 1.0, divisor)


@dataclass(frozen=True)
class LaProp(Elementwise):
    """An average of normalised gradients, where Adam normalises an average (arXiv 2002.04839).

        v <- v + (1 - beta2)(g^2 - v),  u = g / (sqrt(v / (1 - beta2^t)) + eps)
        m <- m + (1 - beta1)(u - m),  d = m / (1 - beta1^t)

    The published code has the rate inside the average; with a constant rate that is the same.
    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Example:
        >>> sorted(LaProp.moments)
        ['exp_avg', 'exp_avg_sq']
    """

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "exp_avg_sq": Moment(signed=False)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2, eps and both corrections."""
        beta1, beta2 = hp.betas
        return (
            1.0 - beta1,
            1.0 - beta2,
            max(hp.eps, LEAST_EPS),
            1.0 / (1.0 - beta1**t),
            (1.0 - beta2**t) ** -0.5,
        )

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The second moment, then the average of what it normalises."""
        rate1, rate2, eps, _, correction2 = x.numbers
        first, second = m["exp_avg"], m["exp_avg_sq"]
        second = torch.addcmul(second, g * g - second, rate2)
        unit = g / (second.sqrt() * correction2 + eps)
        return {"exp_avg": torch.addcmul(first, unit - first, rate1), "exp_avg_sq": second}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The average."""
        return m["exp_avg"] * x.numbers[3]


@dataclass(frozen=True)
class NAdam(Adam):
    """Adam that looks ahead along its momentum (Dozat 2016), as torch does.

        mu_t = beta1 (1 - 0.5 0.96^(t decay)),  P_t = mu_1 ... mu_t;  m, v as Adam
        d = ((1 - mu_t) / (1 - P_t) g + mu_(t+1) / (1 - P_(t+1)) m) / (sqrt(v / (1 - beta2^t)) + eps)

    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        momentum_decay: how fast mu rises to beta1, at least 0.

    Raises:
        UserError: a negative decay.

    Example:
        >>> NAdam().momentum_decay
        0.004
    """

    momentum_decay: float = 0.004

    def __post_init__(self) -> None:
        if self.momentum_decay < 0.0:
            raise UserError(f"nadam: momentum_decay is at least 0, got {self.momentum_decay}")

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Adam's, with the factors of gradient and average."""
        beta1, beta2 = hp.betas
        now, done = _schedule(beta1, self.momentum_decay, t)
        ahead = _mu(beta1, self.momentum_decay, t + 1)
        factors = ((1.0 - now) / (1.0 - done), ahead / (1.0 - done * ahead))
        return 1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS), *factors, (1.0 - beta2**t) ** -0.5

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        _, _, eps, here, ahead, correction2 = x.numbers
        return (here * g + ahead * m["exp_avg"]) / (m.root("exp_avg_sq") * correction2 + eps)


def _mu(beta1: float, decay: float, t: int) -> float:
    return float(beta1 * (1.0 - 0.5 * 0.96 ** (t * decay)))


_PRODUCTS: dict[tuple[float, float], list[float]] = {}


def _schedule(beta1: float, decay: float, t: int) -> tuple[float, float]:
    """mu_t, and the product of all up to it; products are kept, an age is asked for again and again."""
    products = _PRODUCTS.setdefault((beta1, decay), [1.0])
    while len(products) <= t:
        products.append(products[-1] * _mu(beta1, decay, len(products)))
    return _mu(beta1, decay, t), products[t]
