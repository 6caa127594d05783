"""Adam: the step is an average of gradients over the root of an average of their squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments
from lowmem.optim.terms.changes import Rotation
from lowmem.optim.terms.fp32 import LARGEST_MOMENT, LEAST_EPS
from lowmem.optim.terms.hyper import Hyper


def averages(g: Tensor, m: Moments, rate1: Tensor, rate2: Tensor) -> dict[str, Tensor]:
    """Both moments; addcmul rounds once where a product and a sum round twice, as torch.lerp does."""
    first, second = m["exp_avg"], m["exp_avg_sq"]
    return {
        "exp_avg": torch.addcmul(first, g - first, rate1),
        "exp_avg_sq": torch.addcmul(second, g * g - second, rate2),
    }


@dataclass(frozen=True)
class Adam(Elementwise):
    """Adam with decoupled decay (arXiv 1412.6980, 1711.05101).

        m <- m + (1 - beta1)(g - m),  v <- v + (1 - beta2)(g^2 - v)
        d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Holds both moments and 4 bytes for the age t: 8 m n + 4 for an (m, n) weight in fp32.

    Example:
        >>> from lowmem.optim.elementwise import coded
        >>> sorted(coded(Adam(), "int8").init(torch.zeros(3, 5)))
        ['age', 'exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq.codes', 'exp_avg_sq.scale']
    """

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg": Moment(), "exp_avg_sq": Moment(signed=False)}

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2, eps, and what the bias corrections multiply by."""
        beta1, beta2 = hp.betas
        rates = 1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS)
        return *rates, 1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        """Both averages."""
        return averages(g, m, *x.numbers[:2])

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        """The quotient."""
        _, _, eps, correction1, correction2 = x.numbers
        return (m["exp_avg"] * correction1) / (m.root("exp_avg_sq") * correction2 + eps)

    def rotated(self, m: Mapping[str, Tensor], turn: Rotation, age: Tensor, hp: Hyper) -> dict[str, Tensor]:
        """The second moment is transported as a variance (arXiv 2410.16103), both without their bias.

        V <- |(C o C)(V - M^2) + (C M)^2|
        """
        corrections = (1.0 - hp.vector(*hp.betas) ** age).float()
        # at age 0 both moments are 0, and so is what is divided
        bias1, bias2 = corrections.clamp(min=torch.finfo(torch.float32).tiny).unbind()
        first = (m["exp_avg"] / bias1).clamp(-(LARGEST_MOMENT**0.5), LARGEST_MOMENT**0.5)
        second = (m["exp_avg_sq"] / bias2).clamp(max=LARGEST_MOMENT)
        turned = turn(first)
        variance = (turn.squares(second - first.square()) + turned.square()).abs()
        return {"exp_avg": turned * corrections[0], "exp_avg_sq": variance * corrections[1]}
