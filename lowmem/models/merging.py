"""One model of the ordinary kind out of a base and the adapter on it.

    W <- W + dW,  for LoRA  dW = (alpha / r) B A,  in fp32 and rounded once to the dtype of W

PEFT rounds the change before it adds it, and the sum once more; and where embedding and head are one
tensor it changes both by what was trained for one of them. Both are seen to here: each matrix is merged
in fp32, and a tied tensor becomes two where an adapter takes hold of it, one again where both end equal.
"""

from __future__ import annotations

from typing import Any

from lowmem.errors import UserError, first_line
from lowmem.models.quiet import quiet


def merged(model: Any, name: str) -> Any:
    """The base with the adapter in its weights; `model` is used up.

    Holds beside it the change of one matrix (m, n): 12 m n bytes; a tied embedding of which an adapter
    changes one use is held twice.

    Args:
        model: of PEFT; name: of its folder, for messages.

    Raises:
        UserError: a method that adds no weights (prompts), or whose weights cannot be merged.
    """
    kind = str(getattr(model.peft_config["default"], "peft_type", "?")).rpartition(".")[2]
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UserError(f"{name}: {kind} adds no weights that could be merged; use it as it is")
    inner = model.get_base_model()
    try:
        with quiet():
            apart = _untie(inner)
            _merge_layers(inner)
            whole = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{name} ({kind}) cannot be merged: {first_line(error)}") from error
    if apart:
        _tie_equal(whole)
    return whole


def _merge_layers(model: Any) -> None:
    """Merge layer by layer, each in fp32; that PEFT then only unwraps, whatever its layers know of it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        held = layer.get_base_layer()
        dtypes = {name: p.dtype for name, p in held.named_parameters() if p.is_floating_point()}
        held.float()
        layer.merge(safe_merge=True)
        layer.merge = _merged_before
        for name, p in held.named_parameters():
            if name in dtypes:
                p.data = p.data.to(dtypes[name])


def _merged_before(**_: Any) -> None:
    """Do not merge a second time; some methods would."""


def _untie(model: Any) -> bool:
    """Give the head a weight of its own where an adapter changes it or the embedding; whether it did."""
    from torch import nn

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    words, head = _within(ends[0]), _within(ends[1])
    if ends == (words, head) or not hasattr(head, "weight") or words.weight is not head.weight:
        return False
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return True


def _within(end: Any) -> Any:
    """What a wrapper of PEFT was put around."""
    while (inner := getattr(end, "base_layer", getattr(end, "original_module", None))) is not None:
        end = inner
    return end


def _tie_equal(model: Any) -> None:
    """Make embedding and head one tensor again where the adapter left them equal."""
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if words.shape == head.weight.shape and bool((words == head.weight).all()):
        head.weight, model.config.tie_word_embeddings = words, True
