"""A model small enough for hundreds of runs that holds every kind of weight there is.

Tall, wide, square, prime and odd matrices, a 4-D convolution, GPT-2's transposed Conv1D, an embedding
tied to the head, norms and biases, in numbered layers; and the loss that the contract suite lowers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH = 23, 12


class First(nn.Module):
    """Matrices of some shapes, under the names a decoder layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 31, bias=False)
        self.down_proj = nn.Linear(31, 17)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(self.input_layernorm(x))))
        return out


class Second(nn.Module):
    """Matrices of the other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.c_proj = Conv1D(13, 17)  # type: ignore[no-untyped-call]
        self.o_proj = nn.Linear(13, 13, bias=False)
        self.conv = nn.Conv2d(1, 5, (3, 2), bias=False)
        self.out_proj = nn.Linear(5 * 11 * 12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o_proj(self.c_proj(x))
        image = (y.unsqueeze(-1) * y.unsqueeze(-2)).unsqueeze(1)  # of full rank, as its gradients are then
        out: Tensor = self.out_proj(self.conv(image).flatten(1))
        return out


class Zoo(nn.Module):
    """Next-token logits from one token; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([First(), Second()])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        logits: Tensor = self.lm_head(self.norm(x + self.layers[1](self.layers[0](x))))
        return logits.float()


def build(dtype: torch.dtype = torch.float32, seed: int = 0) -> Zoo:
    """The same weights for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Zoo().to(dtype)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """A learnable mapping from token to token, other tokens in each step."""
    g = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (size,), generator=g)
    return ids, (5 * ids + 3) % VOCABULARY


def loss_of(model: nn.Module, step: int, size: int = 16) -> Tensor:
    """The loss of a step's batch."""
    ids, target = batch(step, size)
    return F.cross_entropy(model(ids), target)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """The loss over every token."""
    ids = torch.arange(VOCABULARY)
    return float(F.cross_entropy(model(ids), (5 * ids + 3) % VOCABULARY))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
