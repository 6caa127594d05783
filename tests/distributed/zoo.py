"""Tensors of every kind that sharding makes hard, and gradients for them, the same in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.optim.blocks import matrix_shape
from tests.contract.test_bits import normal

SHAPES = {
    "tall": (37, 12),
    "wide": (12, 40),
    "one_row": (1, 9),
    "aligned": (64, 128),
    "misaligned": (45, 100),
    "vector": (70,),
    "number": (1,),
    "experts": (5, 6, 8),
    "kernel": (10, 3, 2, 2),
}


class Layer(nn.Module):
    """One parameter of each shape."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            setattr(self, name, nn.Parameter(normal(shape, -1, i)))


class Zoo(nn.Module):
    """A numbered layer, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(23, 12)
        self.layers = nn.ModuleList([Layer()])
        self.lm_head = nn.Linear(12, 23, bias=False)
        self.embed_tokens.weight.data.copy_(normal((23, 12), -2))
        self.lm_head.weight = self.embed_tokens.weight


def gradient(shape: tuple[int, ...], step: int, i: int, bad: bool) -> Tensor:
    """A gradient whose singular values are apart, so that its leading ones have one basis; or with a NaN."""
    m, n = matrix_shape(shape)
    sizes = 0.5 ** torch.arange(min(m, n)).clamp(max=8)
    g = normal((m, len(sizes)), step, i) * sizes @ normal((len(sizes), n), step, i, 1)
    g = (g + 1e-3 * normal((m, n), step, i, 2)).view(shape)
    if bad:
        g.view(-1)[-1] = torch.nan
    return g


class Net(nn.Module):
    """A small network that runs forward: what has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.up = nn.Linear(12, 37)
        self.norm = nn.LayerNorm(37)
        self.head = nn.Linear(37, 23, bias=False)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(normal(p.shape, -3, i) * 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.up(self.embed(tokens)).tanh()))
        return logits


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The same batch on every rank."""
    tokens = torch.arange(16) * (step + 2) % 23
    return nn.functional.cross_entropy(model(tokens).float(), (5 * tokens + 3) % 23)
