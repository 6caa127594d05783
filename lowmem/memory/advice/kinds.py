"""What a method keeps of the two whole moments of Adam: an order of expectation, not of measurement."""

from __future__ import annotations

import torch

from lowmem.memory import count
from lowmem.memory.run import Run
from lowmem.optim.strategy import Strategy

KINDS = (
    "whole moments",
    "moments in few bits",
    "one whole moment",
    "moments of a subspace or of sums",
    "int8 weights",
    "LoRA",
    "LoRA over 4 bits",
    "no moments",
    "no gradients",
)
"""What is kept of two whole moments of every weight, best first."""


def kind_of(strategy: Strategy, run: Run) -> str:
    """What is kept of two moments of every weight: by what the state of a large matrix takes."""
    if not strategy.source.needs_autograd:
        return "no gradients"
    if run.adapts:
        return "LoRA over 4 bits" if run.quantize else "LoRA"
    if run.weights:
        return "int8 weights"
    shape = (1024, 1024)
    each = count.state_bytes(strategy, shape, torch.bfloat16) / (shape[0] * shape[1])
    if strategy.options.get("projector", "none") != "none":
        return "moments of a subspace or of sums"
    limits = (
        (7.9, "whole moments"),
        (3.9, "one whole moment"),
        (0.4, "moments in few bits"),
        (1e-4, "moments of a subspace or of sums"),
    )
    return next((kind for least, kind in limits if each >= least), "no moments")
