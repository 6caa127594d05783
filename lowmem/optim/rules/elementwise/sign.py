"""Rules that take the size of a step from somewhere else than an average: Lion's sign, Ano's own gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.fp32 import LEAST_EPS
from lowmem.optim.terms.hyper import Hyper


@dataclass(frozen=True)
class Lion(Elementwise):
    """The sign of an interpolation between gradient and momentum (arXiv 2302.06675).

        d = sign(beta1 m + (1 - beta1) g),  then  m <- m + (1 - beta2)(g - m)

    Every element moves by lr: take it 3 to 10 times smaller than AdamW's, weight decay as much larger.
    Bytes for an (m, n) weight in fp32: 4 m n.

    Example:
        >>> import torch
        >>> from lowmem.optim.elementwise import coded
        >>> sorted(coded(Lion()).init(torch.zeros(2, 2)))
        ['exp_avg']
    """

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment()}
    ages: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset({"betas"})

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2."""
        beta1, beta2 = hp.betas
        return 1.0 - beta1, 1.0 - beta2

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """The momentum, which the step does not see yet."""
        return {"exp_avg": m["exp_avg"] + x.numbers[1] * (g - m["exp_avg"])}

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The sign, from the momentum before this gradient."""
        return (old["exp_avg"] + x.numbers[0] * (g - old["exp_avg"])).sign()


@dataclass(frozen=True)
class Ano(Elementwise):
    """The direction of the momentum, the size of the gradient (arXiv 2508.18258).

        m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) sign(g^2 - v) g^2
        d = |g| sign(m) / (sqrt(v / (1 - beta2^t)) + eps)

    The paper takes betas (0.92, 0.99). The published PyTorch code puts eps inside the root, its TensorFlow
    code and this one outside. Bytes for an (m, n) weight in fp32: 8 m n + 4.

    Example:
        >>> sorted(Ano.moments)
        ['exp_avg', 'exp_avg_sq']
    """

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "exp_avg_sq": Moment(signed=False)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, beta2, 1 - beta2, eps, and what the root is multiplied by."""
        beta1, beta2 = hp.betas
        return 1.0 - beta1, beta2, 1.0 - beta2, max(hp.eps, LEAST_EPS), (1.0 - beta2**t) ** -0.5

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Both; the second falls where a gradient is small, and below 0 for no beta2 of at least a half."""
        rate1, beta2, rate2 = x.numbers[:3]
        square, second = g * g, m["exp_avg_sq"]
        return {
            "exp_avg": m["exp_avg"] + rate1 * (g - m["exp_avg"]),
            "exp_avg_sq": (beta2 * second + rate2 * (square - second).sign() * square).clamp(min=0.0),
        }

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        return g.abs() * m["exp_avg"].sign() / (m.root("exp_avg_sq") * x.numbers[4] + x.numbers[3])
