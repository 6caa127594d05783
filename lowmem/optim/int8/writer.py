"""How int8 weights take a step: decode a block, step, find its scale, encode; all inside the kernel.

In units of the scale, a code c moves by

    delta = c (decay - 1) - (lr / scale) D
    stochastic  c <- c + floor(delta) + [u < delta - floor(delta)]         u uniform: the mean is right
    eco         c <- c + round(delta + e),  e <- delta + e - round(delta + e)
    nearest     c <- c + round(delta)

so that a step of a ten-thousandth of a code is told apart at every code, and a code that takes no
step stays, to the last bit. A block keeps its scale while its largest code, stepped, is between 64
and 127. Otherwise all of the block is encoded by a new one, the largest at 120: with some room above,
a maximum that grows does not have the block rounded anew at every step.

ECO (arXiv 2601.22101) puts e into the first moment and keeps no copy of the weight. Its published
rule lets e act one step late for ever, and no code moves for q / (2 lr (1 - beta)) steps; its exact form,
of which the weights are those of a master copy, needs e itself. So e is what is held here, one byte
for each weight in 254ths of a code, itself rounded at random; it is added to the weight, which gives
the same weights as returning it through the moment, under every rule and with moments of any precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowmem.optim.engine import noise
from lowmem.optim.int8.coding import BLOCK, LEAST, MOST
from lowmem.optim.terms.hyper import ChunkHyper
from lowmem.optim.terms.state import State

Rounding = Literal["stochastic", "eco", "nearest"]
PARTS = 254.0
"""Of a code's spacing: what an error is counted in."""
LOW, HIGH = MOST / 2, 120.0
"""The largest code below which a block is encoded anew, and what it is then."""


@dataclass(frozen=True)
class Int8Writer:
    """Write int8 codes; holds 0 bytes, with `eco` 1 byte for each weight.

    Args:
        rounding: stochastic, eco or nearest.
    """

    rounding: Rounding = "stochastic"
    streams: tuple[str, ...] = ("weight",)

    @property
    def beside(self) -> tuple[str, ...]:
        """What of the weight itself a chunk is given."""
        return ("scale",)

    @property
    def grain(self) -> int:
        """Elements of a block."""
        return BLOCK

    @property
    def per(self) -> Mapping[str, int]:
        """Elements for each scale."""
        return {"scale": BLOCK}

    def init(self, x: Tensor) -> State:
        """The error of each code, int8, for eco."""
        if self.rounding != "eco":
            return {}
        return {"error": torch.zeros(x.numel(), dtype=torch.int8, device=x.device)}

    def read(self, w: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """What the codes of a chunk stand for."""
        return (w.reshape(-1, BLOCK).float() * s["scale"].reshape(-1, 1)).view(w.shape)

    def write(
        self, w: Tensor, d: Tensor, s: Mapping[str, Tensor], hp: ChunkHyper, decay: Tensor
    ) -> tuple[Tensor, State]:
        """Step codes, and their scales where they must follow."""
        codes, scale = w.reshape(-1, BLOCK).float(), s["scale"].reshape(-1, 1)
        decay = decay.expand(w.shape).reshape(-1, BLOCK)
        delta = codes * (decay - 1.0) - d.reshape(-1, BLOCK) * (hp.lr / scale)
        moves = delta != 0.0
        word = hp.noise("weight").reshape(-1, BLOCK)
        if self.rounding == "eco":
            held = s["error"].reshape(-1, BLOCK)
            delta = delta + held.float() / PARTS
        delta, new_scale, anew = _rescaled(codes, delta, scale, moves)
        touched = moves | anew
        if self.rounding == "stochastic":
            low = torch.floor(delta)
            steps = low + (noise.uniform(word) < delta - low).float()
        else:
            steps = torch.round(delta)
        steps = torch.where(touched, steps, 0.0)
        new = (codes + steps).clamp(-MOST, MOST).to(torch.int8).view(w.shape)
        kept = {"scale": new_scale.view(s["scale"].shape)}
        if self.rounding == "eco":
            left = torch.floor((delta - steps) * PARTS + noise.uniform(word)).clamp(-MOST, MOST)
            kept["error"] = torch.where(touched, left, held.float()).to(torch.int8).view(s["error"].shape)
        return new, kept


def _rescaled(codes: Tensor, delta: Tensor, scale: Tensor, moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far codes move, the scales, and which blocks have new ones; what would not be finite stays."""
    largest = (codes + delta).abs().amax(1, keepdim=True)
    wanted = (largest * scale / HIGH).clamp(min=LEAST)
    sound = wanted <= torch.finfo(torch.float32).max
    inside = (largest >= LOW) & (largest <= MOST)
    anew = ~inside & moves.float().amax(1, keepdim=True).bool() & sound
    new_scale = torch.where(anew, wanted, scale)
    follow = (codes + delta) * (scale / new_scale) - codes
    return torch.where(anew, follow, torch.where(sound, delta, 0.0)), new_scale, anew
