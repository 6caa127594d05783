"""A probe of the curvature inside the Trainer, where the strategy asks for one at this step.

The first micro-batch of a step goes through the model once more, without labels; the optimizer draws
labels from its logits and differentiates their loss. Positions that have no label do not count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import UserError

IGNORED = -100


def tell_curvature(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Probe where the next step asks for it.

    Raises:
        UserError: a model that gives no logits, or a batch without labels.
    """
    optimizer = trainer.lowmem_optimizer
    if not optimizer.probe_due:
        return
    model.train()
    batch = trainer._prepare_inputs(dict(inputs))
    labels = batch.pop("labels", None)
    with torch.enable_grad(), trainer.compute_loss_context_manager():
        logits = getattr(model(**batch), "logits", None)
    if logits is None or labels is None:
        lacks = "logits of its model" if logits is None else "labels in its batches"
        raise UserError(
            f"{optimizer.strategy.name} probes the curvature by {lacks}, and found none; take adamw or lion"
        )
    optimizer.probe(*placed(logits, labels))


def placed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that predict labels, and which of them count: those of a next token, or of a class."""
    if logits.dim() == labels.dim() + 1 and labels.dim() > 1:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return logits, labels != IGNORED
