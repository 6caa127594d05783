"""Which of several answers a model finds likeliest (the loss of MeZO's classification, arXiv 2305.17333).

    score(a) = mean over the tokens of a of  log p(token | prompt, the tokens before)
    loss     = -log softmax(scores)[right]

The mean, not the sum: candidates differ in length. It is a loss like any other, for every strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem.models.loss import IGNORE, supports


def candidate_scores(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean log-likelihood of the label tokens of each sequence, from fp32 logits.

    Args:
        model: causal language model.
        inputs: its keyword arguments, with `labels` (sequences, length), unshifted, one or more in each.

    Returns:
        (sequences,) fp32.

    Where the model can, logits exist at label positions only.
    """
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
    keep = targets != IGNORE
    sparse = {"logits_to_keep": keep} if supports(model) else {}
    logits = model(**{**rest, "use_cache": False, **sparse}).logits
    if logits.dim() == 3 and logits.shape[:2] == keep.shape:  # all of them
        logits = logits[keep]
    lost = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[keep], reduction="none")
    owner = keep.nonzero()[:, 0]
    of = (owner == torch.arange(len(keep), device=owner.device)[:, None]).float()
    return -(of @ lost) / of.sum(1)


def padded(scores: Tensor, counts: Tensor) -> Tensor:
    """Scores of rows one after the other as (rows, most candidates); -inf where a row has fewer.

    Example:
        >>> padded(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2]))
        tensor([[1., -inf],
                [2., 3.]])
    """
    there = torch.arange(int(counts.max()), device=scores.device) < counts[:, None]
    empty = torch.full(there.shape, -torch.inf, device=scores.device)
    return empty.masked_scatter(there, scores)


def choice_loss(scores: Tensor, right: Tensor) -> Tensor:
    """The sum over rows of -log softmax(scores)[right].

    Args:
        scores: (rows, candidates) from `padded`; right: (rows,) places.
    """
    return -scores.log_softmax(1).gather(1, right[:, None]).sum()


def f1(chosen: Tensor, right: Tensor) -> float:
    """Mean over the places that are right somewhere of the F1 of choosing them (macro F1).

    Args:
        chosen, right: (rows,) places.

    Example:
        >>> f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        0.6666666666666666
    """
    each = []
    for place in sorted(set(right.tolist())):
        hit = int(((chosen == place) & (right == place)).sum())
        each.append(2 * hit / int((chosen == place).sum() + (right == place).sum()))
    return sum(each) / max(len(each), 1)
