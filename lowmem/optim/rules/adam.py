"""Adam over codecs: the arithmetic does not know how its moments are held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import BLOCK
from lowmem.optim.codecs import Codec, Dense, codec
from lowmem.optim.contract import (
    AnyRule,
    Change,
    ChunkHyper,
    Hyper,
    Keep,
    Rotate,
    State,
    apply_in_place,
    at_hand,
    part,
    prefixed,
    reset_,
)

LEAST_EPS = 1e-18
"""A smaller eps counts as this: 0 / 0 is no step, and squares of smaller gradients have no fp32."""

LARGEST = 1e36
"""Rotated second moments end here: room is left for scales that are rounded up and for bias corrections."""


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled decay (arXiv 1412.6980, 1711.05101).

        m <- m + (1 - beta1)(g - m),  v <- v + (1 - beta2)(g^2 - v)
        d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Holds what the two codecs hold, and 4 bytes for the age t: 8 m n + 4 for an
    (m, n) weight with fp32 moments.

    Args:
        exp_avg: codec of the first moment.
        exp_avg_sq: codec of the second moment.

    Example:
        >>> sorted(Adam.of("int8").init(torch.zeros(3, 5)))
        ['age', 'exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq.codes', 'exp_avg_sq.scale']
    """

    exp_avg: Codec = field(default_factory=lambda: Dense(stream="exp_avg"))
    exp_avg_sq: Codec = field(default_factory=lambda: Dense(stream="exp_avg_sq"))
    compilable: bool = True

    @classmethod
    def of(cls, states: str) -> Adam:
        """Adam with both moments held as `states` says (fp32, bf16, int8, int4, companded8)."""
        first = codec(states, signed=True, stream="exp_avg")
        return cls(first, codec(states, signed=False, stream="exp_avg_sq"))

    @property
    def grain(self) -> int:
        """Elements that must stay together: a block of either codec."""
        return math.lcm(self.exp_avg.grain, self.exp_avg_sq.grain)

    @property
    def per(self) -> Mapping[str, int]:
        """The codecs' tensors are cut; the age is not."""
        return self._named(self.exp_avg.per, self.exp_avg_sq.per)

    @property
    def fill(self) -> Mapping[str, int]:
        """Those of the codecs."""
        return self._named(self.exp_avg.fill, self.exp_avg_sq.fill)

    @property
    def streams(self) -> tuple[str, ...]:
        """Those of the codecs."""
        return self.exp_avg.streams + self.exp_avg_sq.streams

    @staticmethod
    def _named(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
        both = {f"exp_avg.{k}" if k else "exp_avg": v for k, v in first.items()}
        return both | {f"exp_avg_sq.{k}" if k else "exp_avg_sq": v for k, v in second.items()}

    def init(self, x: Tensor) -> State:
        """Both moments zero, age 0."""
        age = {"age": torch.zeros((), dtype=torch.int32, device=x.device)}
        return self._join(self.exp_avg.init(x), self.exp_avg_sq.init(x)) | age

    @staticmethod
    def _join(first: State, second: State) -> State:
        return prefixed("exp_avg", first) | prefixed("exp_avg_sq", second)

    def shared(self, x: Tensor) -> State:
        """The codecs' tables."""
        return self.exp_avg.shared(x) | self.exp_avg_sq.shared(x)

    def scalars(self, s: State, hp: Hyper) -> Tensor:
        """1 - beta1, 1 - beta2, eps, and what the bias corrections multiply by; betas in double precision."""
        beta1, beta2 = hp.betas
        rates = (1.0 - beta1, 1.0 - beta2, max(hp.eps, LEAST_EPS))
        if (t := at_hand(s["age"])) is not None:  # the same for nearly all tensors, and cached
            bias = (1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5) if t else (math.inf, math.inf)
            return hp.vector(*rates, *bias, dtype=torch.float32)
        corrections = (1.0 - hp.vector(beta1, beta2) ** s["age"]) ** hp.vector(-1.0, -0.5)
        return torch.cat((hp.vector(*rates), corrections)).float()

    def step(self, g: Tensor, s: State, hp: ChunkHyper) -> tuple[Tensor, State]:
        """The equations above, on one chunk."""
        rate1, rate2, eps, correction1, correction2 = hp.scalars[:5].unbind()
        old1 = self.exp_avg.decode(part(s, "exp_avg"), s)
        old2 = self.exp_avg_sq.decode(part(s, "exp_avg_sq"), s)
        # addcmul rounds once where a product and a sum round twice; so does torch.lerp, hence torchao
        m = hp.keep(torch.addcmul(old1, g - old1, rate1), old1)
        v = hp.keep(torch.addcmul(old2, g * g - old2, rate2), old2)
        root = v.sqrt()
        d = (m * correction1) / (root * correction2 + eps)
        new = self._join(self.exp_avg.encode(m, hp, s), self.exp_avg_sq.encode(v, hp, s, root))
        return d, new

    def moments(self, s: State) -> State:
        """exp_avg and exp_avg_sq, flat fp32."""
        return {
            "exp_avg": self.exp_avg.decode(part(s, "exp_avg"), s),
            "exp_avg_sq": self.exp_avg_sq.decode(part(s, "exp_avg_sq"), s),
        }

    def check_rebase(self, kind: str) -> None:
        """Rotating needs to re-encode whole moments: fp32 ones are exact."""
        dense = isinstance(self.exp_avg, Dense) and isinstance(self.exp_avg_sq, Dense)
        if kind == "rotate" and not (dense and self.exp_avg == Dense(stream="exp_avg")):
            raise UserError(
                "on_refresh='rotate' needs states='fp32'; take states='fp32' or on_refresh='keep'"
            )

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Keep, reset, or rotate.

        Rotating transports the second moment as a variance (arXiv 2410.16103):
        V <- |(C o C)(V - M^2) + (C M)^2| with bias-corrected M and V.
        """
        if isinstance(change, Keep):
            return
        if isinstance(change, Rotate):
            for piece in _strips(s, shape, 1 - change.axis):
                apply_in_place(piece, self._rotated(piece, change, hp))
        else:
            reset_(s, self.init(torch.empty(1, 1, device=hp.weight.device)), change)

    @staticmethod
    def _rotated(s: State, change: Rotate, hp: Hyper) -> State:
        beta1, beta2 = hp.betas
        corrections = (1.0 - hp.vector(beta1, beta2) ** s["age"]).float()
        # at age 0 both moments are 0, and so is what is divided
        bias1, bias2 = corrections.clamp(min=torch.finfo(torch.float32).tiny).unbind()
        m = (s["exp_avg"] / bias1).clamp(-(LARGEST**0.5), LARGEST**0.5)
        v = (s["exp_avg_sq"] / bias2).clamp(max=LARGEST)
        c, squares = change.matrix, change.matrix.square()
        turned = c @ m if change.axis == 0 else m @ c.t()
        spread = v - m.square()
        spread = squares @ spread if change.axis == 0 else spread @ squares.t()
        variance = (spread + turned.square()).abs()
        return {"exp_avg": turned * corrections[0], "exp_avg_sq": variance * corrections[1]}


def _strips(s: State, shape: tuple[int, int], axis: int) -> Iterator[State]:
    """Both moments cut along an axis, so that what is made of a piece stays small."""
    width = max(1, BLOCK // shape[1 - axis])
    for start in range(0, shape[axis], width):
        length = min(width, shape[axis] - start)
        cut = {key: s[key].narrow(axis, start, length) for key in ("exp_avg", "exp_avg_sq")}
        yield cut | {"age": s["age"]}


def outside(states: str) -> dict[str, AnyRule]:
    """The rules of what is not a matrix: Adam, with fp32 moments where a codec is not worth it."""
    rules: dict[str, AnyRule] = {"other": Adam.of(states)}
    return rules if states in ("fp32", "bf16") else {**rules, "small": Adam()}
