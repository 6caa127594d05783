"""8 bits at equal distances: enough for a momentum of which only the singular vectors count.

The dynamic map spends its codes on seven decades, which a denominator needs. A momentum that is made
orthogonal needs its large elements exactly: there a linear map has a third of the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import ChunkHyper
from lowmem.optim.terms.state import State


@dataclass(frozen=True)
class Linear:
    """A moment with a sign in 8 bits: code = round(x / scale), scale = max |x| / 127 (arXiv 2509.23106).

    Bytes for d elements: d + 4 ceil(d / 2048). Error at most half a scale.

    Example:
        >>> sorted(Linear().init(torch.zeros(3, 5)))
        ['codes', 'scale']
    """

    grain: ClassVar[int] = 2048
    per: ClassVar[Mapping[str, int]] = {"codes": 1, "scale": 2048}
    fill: ClassVar[Mapping[str, int]] = {}
    streams: ClassVar[tuple[str, ...]] = ()
    spills: ClassVar[int] = 0

    def init(self, x: Tensor) -> State:
        """Codes and scales of zero."""
        d = x.numel()
        return {
            "codes": torch.zeros(d, dtype=torch.int8, device=x.device),
            "scale": torch.zeros(-(-d // self.grain), device=x.device),
        }

    def shared(self, x: Tensor) -> State:
        """Nothing."""
        return {}

    def decode(self, s: State, constants: Mapping[str, Tensor]) -> Tensor:
        """code scale."""
        codes = s["codes"].float()
        return (codes.view(*codes.shape[:-1], -1, self.grain) * s["scale"].unsqueeze(-1)).flatten(-2)

    def encode(
        self, value: Tensor, hp: ChunkHyper, constants: Mapping[str, Tensor], root: Tensor | None = None
    ) -> State:
        """To nearest, halves to even."""
        blocks = value.view(*value.shape[:-1], -1, self.grain)
        scale = (blocks.abs().amax(-1) / 127.0).clamp(min=TINY)
        codes = (blocks / scale.unsqueeze(-1)).round().clamp(-127.0, 127.0)
        return {"codes": codes.to(torch.int8).flatten(-2), "scale": scale}
