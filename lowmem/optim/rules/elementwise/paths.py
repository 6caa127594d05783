"""Rules that follow a second path beside the weights, a pulled one (INNAprop) or an average (schedule-free).

Papers hold the other point itself, a copy of the weights. Its distance to the weights is what is
held here: it starts at zero, is of the size of some steps, and bears coding. Neither rule reads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.fp32 import LEAST_EPS
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class INNAprop(Elementwise):
    """A heavy ball whose friction looks at the gradient's change, over RMSprop (arXiv 2410.05871).

        v <- v + (1 - beta2)(g^2 - v),  u = g / (sqrt(v / (1 - beta2^t)) + eps)
        d = p / beta + beta u,  then  p <- (1 - alpha lr) p + (1 - alpha beta) beta lr u

    The paper's second point is psi = p + (1 - alpha beta) W; in terms of it the step divides by lr - beta.
    With alpha beta = 1, p stays 0 and this is RMSprop. The decay is decoupled: p does not see it, where
    psi of the published code lags behind the decayed weight. beta1 is not used.
    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        alpha: viscous friction, at least 0.
        beta: friction by the change of the gradient, above 0.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> INNAprop(alpha=2.0, beta=2.0).alpha
        2.0
    """

    alpha: float = 0.1
    beta: float = 0.9
    moments: ClassVar[Mapping[str, Moment]] = {"pull": Moment(), "exp_avg_sq": Moment(signed=False)}

    def __post_init__(self) -> None:
        if self.alpha < 0.0 or not self.beta > 0.0:
            raise UserError(f"innaprop: alpha >= 0 and beta > 0, got {self.alpha} and {self.beta}")

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta2, eps, and what the root is multiplied by."""
        beta2 = hp.betas[1]
        return 1.0 - beta2, max(hp.eps, LEAST_EPS), (1.0 - beta2**t) ** -0.5

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The second moment, and the pull, which lives in units of the weight."""
        second = torch.addcmul(m["exp_avg_sq"], g * g - m["exp_avg_sq"], x.numbers[0])
        unit = g / (second.sqrt() * x.numbers[2] + x.numbers[1])
        gain = (1.0 - self.alpha * self.beta) * self.beta
        pull = m["pull"] + x.lr * (gain * unit - self.alpha * m["pull"])
        return {"pull": pull, "exp_avg_sq": second}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """From the pull before this gradient."""
        unit = g / (m.root("exp_avg_sq") * x.numbers[2] + x.numbers[1])
        return old["pull"] / self.beta + self.beta * unit


@dataclass(frozen=True)
class ScheduleFree(Elementwise):
    """Adam that averages its iterates instead of letting lr fall (arXiv 2405.15682).

        v <- v + (1 - beta2)(g^2 - v),  u = s_t g / (sqrt(v / (1 - beta2^t)) + eps)
        s_t = min(1, t / warmup),  c_t = s_t^2 / (s_1^2 + ... + s_t^2)
        d = (1 - beta1 (1 - c_t)) u + c_t q,  then  q <- (1 - c_t)(q + beta1 u)

    Weights W are the paper's y, where gradients are taken; its base is z = W - lr q, and the average, which
    the paper evaluates, x = W + (1 / beta1 - 1) lr q (see `evaluated`). Take a constant lr: the distance q is
    counted in steps, so that a scheduler scales it too. Decay is decoupled and moves all three points.
    Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Args:
        warmup: steps until steps have their full length; 0 for at once.

    Raises:
        UserError: a negative warmup.

    Example:
        >>> ScheduleFree(warmup=100).warmup
        100
    """

    warmup: int = 0
    moments: ClassVar[Mapping[str, Moment]] = {"distance": Moment(), "exp_avg_sq": Moment(signed=False)}

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UserError(f"schedule_free: warmup is at least 0, got {self.warmup}")

    @property
    def paced(self) -> str:
        """The option that counts steps by the age of moments."""
        return "warmup" if self.warmup else ""

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta2, eps, what the root is multiplied by; beta1, the length of a step, and its weight."""
        beta1, beta2 = hp.betas
        rising = min(t, self.warmup)
        length = rising / self.warmup if self.warmup else 1.0
        known = rising * (rising + 1) * (2 * rising + 1) / (6.0 * max(1, self.warmup) ** 2) + t - rising
        root = (1.0 - beta2**t) ** -0.5
        return 1.0 - beta2, max(hp.eps, LEAST_EPS), root, beta1, length, length * length / known

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The second moment, and how far the base lies behind."""
        second = torch.addcmul(m["exp_avg_sq"], g * g - m["exp_avg_sq"], x.numbers[0])
        beta1, length, weight = x.numbers[3:]
        unit = length * g / (second.sqrt() * x.numbers[2] + x.numbers[1])
        return {"distance": (1.0 - weight) * (m["distance"] + beta1 * unit), "exp_avg_sq": second}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """Towards the base, and along the gradient."""
        beta1, length, weight = x.numbers[3:]
        unit = length * g / (m.root("exp_avg_sq") * x.numbers[2] + x.numbers[1])
        return (1.0 - beta1 * (1.0 - weight)) * unit + weight * old["distance"]

    def centre(self, hp: Hyper) -> Mapping[str, float]:
        """The average; with beta1 = 0 the weight is the base, which knows nothing of it."""
        beta1 = hp.betas[0]
        return {"distance": 1.0 / beta1 - 1.0} if beta1 else {}
