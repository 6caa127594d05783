"""8-bit AdamW with the block-wise dynamic map (arXiv 2110.02861), written out.

The map: for each decade 10^(i-6), i = 0..6, the midpoints of a uniform grid on
[0.1, 1], 2^i cells when signed (then mirrored) and 2^(i+1) when not; with 0 and 1.0.
Each run of 256 elements holds codes and one fp32 scale, its absolute maximum.
A value goes to the nearer neighbour, the upper one on a tie. The order of a step:
decode, fp32 moments, the update from the moments that are not yet encoded, encode.

torchao makes zeros of second moments that are nearest to zero; its next step by a gradient of
zero is then m / eps. lowmem holds them by the entry above zero, as bitsandbytes does in effect:
`keep_above_zero` is the difference between the two formats, and the only one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, ascending, in fp32."""
    values = [0.0, 1.0]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1)
        for mid in ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist():
            values += [mid, -mid] if signed else [mid]
    return torch.tensor(sorted(values))


def blocks_of(x: Tensor, size: int) -> Tensor:
    """The flattened tensor in rows of `size`, the last one padded with zeros."""
    flat = x.reshape(-1)
    return torch.cat([flat, flat.new_zeros(-flat.numel() % size)]).view(-1, size)


def encode(x: Tensor, table: Tensor, size: int = 256) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one for each element) and scales (fp32, one for each block)."""
    rows = blocks_of(x.float(), size)
    scale = rows.abs().amax(1).clamp(min=1e-12)
    y = rows / scale[:, None]
    above = torch.searchsorted(table, y, right=True).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    codes = torch.where(y - low >= (high - low) * 0.5, above, above - 1)
    return codes.to(torch.uint8).view(-1)[: x.numel()].view(x.shape), scale


def lost(x: Tensor, codes: Tensor) -> Tensor:
    """What of an unsigned x is not zero and has the code of zero."""
    return (x.view(codes.shape) > 0.0) & (codes == 0)


def keep_above_zero(x: Tensor, codes: Tensor) -> Tensor:
    """The codes with 1, the entry above zero, for what is lost."""
    return torch.where(lost(x, codes), 1, codes).to(codes.dtype)


def decode(codes: Tensor, scale: Tensor, table: Tensor, size: int = 256) -> Tensor:
    rows = blocks_of(table[codes.int()], size) * scale[:, None]
    return rows.view(-1)[: codes.numel()].view(codes.shape)


@dataclass
class AdamW8bit:
    """One tensor under 8-bit AdamW; fp32 arithmetic in torchao's order of operations.

    With `keeps`, second moments above zero stay there. `lost` tells which elements ever had one that
    torchao's format makes zero: from then on they, and no others, may differ between the two.
    """

    w: Tensor
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    block: int = 256
    keeps: bool = False
    t: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()
        self.maps = {"m": dynamic_map(signed=True), "v": dynamic_map(signed=False)}
        scale = torch.zeros(-(-self.w.numel() // self.block))
        codes = torch.zeros(self.w.shape, dtype=torch.uint8)
        self.state = {"m": (codes, scale), "v": (codes.clone(), scale.clone())}
        self.lost = torch.zeros(self.w.shape, dtype=torch.bool)

    def moment(self, key: str) -> Tensor:
        return decode(*self.state[key], self.maps[key], self.block)

    def step(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        lr, t = torch.tensor(self.lr), torch.tensor(float(self.t))  # 0-D fp32, as torchao has them
        g, w = g.float(), self.w.float()
        w = w - lr * self.weight_decay * w
        m = self.moment("m").lerp(g, 1 - b1)
        v = self.moment("v").lerp(g.square(), 1 - b2)
        codes, scale = encode(v, self.maps["v"], self.block)
        self.lost |= lost(v, codes)
        codes = keep_above_zero(v, codes) if self.keeps else codes
        self.state = {"m": encode(m, self.maps["m"], self.block), "v": (codes, scale)}
        denominator = v.sqrt() / (1 - b2**t).sqrt() + self.eps
        self.w = (w - lr * (m / (1 - b1**t)) / denominator).to(self.w.dtype)
        return self.w
