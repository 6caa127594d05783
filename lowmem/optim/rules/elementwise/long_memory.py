"""Rules that remember more than Adam: a slow average, the gradient before, the change of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.rules.elementwise.adam import averages
from lowmem.optim.terms.fp32 import LEAST_EPS
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class AdEMAMix(Elementwise):
    """Adam with a second, slow average of gradients (arXiv 2409.03137).

        m1 <- m1 + (1 - beta1)(g - m1),  m2 <- m2 + (1 - beta3_t)(g - m2),  v <- v + (1 - beta2)(g^2 - v)
        d = (m1 / (1 - beta1^t) + alpha_t m2) / (sqrt(v / (1 - beta2^t)) + eps)

    Over the first `warmup` steps alpha rises from 0 and the half-life of m2 from that of beta1. The slow
    average is held in bf16 at least: in fewer bits, steps of 1 - beta3 are lost and it stands still.
    Bytes for an (m, n) weight in fp32: 12 m n + 4.

    Args:
        alpha: share of the slow average in the step, at least 0.
        beta3: its decay rate, in [0, 1); its half-life must fit the run.
        warmup: steps until both are reached; 0 for at once.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> AdEMAMix(beta3=0.999).alpha
        2.0
    """

    alpha: float = 2.0
    beta3: float = 0.9999
    warmup: int = 0
    moments: ClassVar[Mapping[str, Moment]] = {
        "exp_avg": Moment(),
        "exp_avg_slow": Moment(states="bf16"),
        "exp_avg_sq": Moment(signed=False),
    }

    def __post_init__(self) -> None:
        if self.alpha < 0.0 or not 0.0 <= self.beta3 < 1.0 or self.warmup < 0:
            raise UserError(
                "ademamix: alpha >= 0, beta3 in [0, 1) and warmup >= 0, "
                f"got {self.alpha}, {self.beta3} and {self.warmup}"
            )

    @property
    def paced(self) -> str:
        """The option that counts steps by the age of moments."""
        return "slow_warmup" if self.warmup else ""

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Rates, eps, alpha and the corrections at this age."""
        beta1, beta2 = hp.betas
        share = min(1.0, t / self.warmup) if self.warmup else 1.0
        beta3 = self.beta3 if share == 1.0 else _between(beta1, self.beta3, share)
        rates = (1.0 - beta1, 1.0 - beta2, 1.0 - beta3)
        return (
            *rates,
            max(hp.eps, LEAST_EPS),
            share * self.alpha,
            1.0 / (1.0 - beta1**t),
            (1.0 - beta2**t) ** -0.5,
        )

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Three averages."""
        rate1, rate2, rate3 = x.numbers[:3]
        first, slow, second = m["exp_avg"], m["exp_avg_slow"], m["exp_avg_sq"]
        return {
            "exp_avg": torch.addcmul(first, g - first, rate1),
            "exp_avg_slow": torch.addcmul(slow, g - slow, rate3),
            "exp_avg_sq": torch.addcmul(second, g * g - second, rate2),
        }

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The mixture over the root."""
        eps, alpha, correction1, correction2 = x.numbers[3:]
        mixed = m["exp_avg"] * correction1 + alpha * m["exp_avg_slow"]
        return mixed / (m.root("exp_avg_sq") * correction2 + eps)


def _between(start: float, end: float, share: float) -> float:
    """A decay rate whose half-life, less one, lies so far on the way from one's to the other's."""

    def life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1.0

    return float(0.5 ** (1.0 / ((1.0 - share) * life(start) + share * life(end) + 1.0)))


@dataclass(frozen=True)
class Adan(Elementwise):
    """Nesterov momentum from differences of gradients (arXiv 2208.06677).

        e = g - g_before (0 at first)
        m <- m + (1 - beta1)(g - m),  q <- q + (1 - beta_diff)(e - q)
        n <- n + (1 - beta2)((g + beta_diff e)^2 - n)
        d = (m / (1 - beta1^t) + beta_diff q / (1 - beta_diff^t)) / (sqrt(n / (1 - beta2^t)) + eps)

    The paper takes betas (0.98, 0.99) with beta_diff 0.92 (there called 1 - beta2), and decays after the
    step; here decay is decoupled and before it, as everywhere. The published code steps as the equations.
    Bytes for an (m, n) weight in fp32: 16 m n + 4.

    Args:
        beta_diff: decay rate of the average difference, in [0, 1).

    Raises:
        UserError: a rate outside its range.

    Example:
        >>> sorted(Adan.moments)
        ['exp_avg', 'exp_avg_diff', 'exp_avg_sq', 'previous']
    """

    beta_diff: float = 0.92
    moments: ClassVar[Mapping[str, Moment]] = {
        "exp_avg": Moment(),
        "exp_avg_diff": Moment(),
        "exp_avg_sq": Moment(signed=False),
        "previous": Moment(states="bf16"),
    }

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta_diff < 1.0:
            raise UserError(f"adan: beta_diff lies in [0, 1), got {self.beta_diff}")

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """Rates, whether there is a gradient before, eps, and the corrections."""
        beta1, beta2, mixed = *hp.betas, self.beta_diff
        before = 0.0 if t == 1 else 1.0
        corrections = (1.0 / (1.0 - beta1**t), mixed / (1.0 - mixed**t), (1.0 - beta2**t) ** -0.5)
        return 1.0 - beta1, 1.0 - mixed, 1.0 - beta2, mixed, before, max(hp.eps, LEAST_EPS), *corrections

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Three averages, and the gradient for the next step."""
        rate1, rate_diff, rate2, mixed, before = x.numbers[:5]
        first, diff, second = m["exp_avg"], m["exp_avg_diff"], m["exp_avg_sq"]
        change = before * (g - m["previous"])
        ahead = g + mixed * change
        return {
            "exp_avg": torch.addcmul(first, g - first, rate1),
            "exp_avg_diff": torch.addcmul(diff, change - diff, rate_diff),
            "exp_avg_sq": torch.addcmul(second, ahead * ahead - second, rate2),
            "previous": g,
        }

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Both averages over the root."""
        eps, correction1, correction_diff, correction2 = x.numbers[5:]
        ahead = m["exp_avg"] * correction1 + m["exp_avg_diff"] * correction_diff
        return ahead / (m.root("exp_avg_sq") * correction2 + eps)


@dataclass(frozen=True)
class DiffGrad(Elementwise):
    """Adam slowed down where the gradient hardly changes (arXiv 1909.11015).

        m, v as Adam;  x = 1 / (1 + exp(-|g_before - g|))
        d = x m / (1 - beta1^t) sqrt(1 - beta2^t) / (sqrt(v) + eps)

    The friction x lies between 0.5 and 1: with the small gradients of language models this is Adam at half
    the rate. The first published code compared the gradient with itself; its second version, and this one,
    keep a copy. Bytes for an (m, n) weight in fp32: 12 m n + 4.

    Example:
        >>> sorted(DiffGrad.moments)
        ['exp_avg', 'exp_avg_sq', 'previous']
    """

    moments: ClassVar[Mapping[str, Moment]] = {
        "exp_avg": Moment(),
        "exp_avg_sq": Moment(signed=False),
        "previous": Moment(states="bf16"),
    }

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2, eps, and both corrections in one factor."""
        beta1, beta2 = hp.betas
        return 1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS), (1.0 - beta2**t) ** 0.5 / (1.0 - beta1**t)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Adam's averages, and the gradient for the next step."""
        return {**averages(g, m, *x.numbers[:2]), "previous": g}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Adam's step times the friction."""
        _, _, eps, correction = x.numbers
        friction = (old["previous"] - g).abs().sigmoid()
        return friction * m["exp_avg"] * correction / (m.root("exp_avg_sq") + eps)
