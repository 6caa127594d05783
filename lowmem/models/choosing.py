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

from lowmem.models.computing.loss import supports


def candidate_scores(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean log-likelihood of the tokens of each candidate, from fp32 logits.

    Args:
        model: causal language model.
        inputs: `input_ids`, `attention_mask`; `keep`, a mask of the places whose next token is asked for;
            `reads` (2, tokens), which of those places and which token; `means` (candidates, tokens).

    Returns:
        (candidates,) fp32.

    Where the model can, logits exist at the kept places only.
    """
    of_model = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    keep, (place, token) = inputs["keep"], inputs["reads"]
    if supports(model):
        logits = model(**of_model, use_cache=False, logits_to_keep=keep).logits
    else:  # virtual tokens may stand before a sequence
        logits = model(**of_model, use_cache=False).logits[:, -keep.shape[1] :][keep]
    likely = logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
    scores: Tensor = inputs["means"] @ likely[place, token]
    return scores


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
