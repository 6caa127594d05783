"""Whether the examples of a packed row stay apart, asked of the model itself.

An architecture may carry a state from token to token, or make its mask without asking where examples
begin: then each example of a packed row is trained on what the ones before it said. No list of names
tells which: it depends on the kernels that are installed as well. So one short row is computed before
the first step:

    d logits(second example) / d embeddings(first example) = 0

exactly, in any dtype and with any experts, where the two stay apart: what a mask takes out of a softmax
has the weight 0, and so has its gradient. Logits of two forward passes would differ in their last
bits where tokens are sorted to experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowmem.errors import UserError, first_line
from lowmem.models.computing.attention import applies, attend_by_example, base

REMEDY = "give --no-packing (packing=False in Python), then each example is a row of its own"
FIRST, SECOND = 3, 4  # tokens of the two examples


def pack(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Make a model ready for packed rows: each example attends by itself.

    Args:
        model: unwrapped; its mode, its gradients and all generators are left as they were.
        context: in which training computes.

    Raises:
        UserError: the model mixes the examples of a row, or says itself that it cannot keep them apart.
    """
    if applies(model):
        attend_by_example(model)
    if any(p.is_meta for p in model.parameters()):
        return  # of several processes the one that holds the weights asks
    with context():
        mixed = mixes(model, _row(model))
    if mixed:
        raise UserError(mixing(model))


def mixing(model: nn.Module, setting: str = "packing", remedy: str = REMEDY) -> str:
    """One line on a model whose packed rows mix their examples.

    Args:
        model: named by its class; setting: that asked for packed rows; remedy: what to give instead.
    """
    kind = type(base(model)).__name__
    return f"{setting}: in a packed row {kind} lets each example see those before it; {remedy}"


def mixes(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether what the second of two packed examples says depends on the first.

    Args:
        model: as for `pack`.
        inputs: a row of two examples, of `FIRST` and `SECOND` tokens, as it is trained on.

    Raises:
        UserError: the model refuses packed rows.
    """
    leaves: list[Tensor] = []
    with _asked(model, leaves), torch.enable_grad():
        try:
            logits = model(**inputs, use_cache=False).logits
        except (ValueError, NotImplementedError) as error:
            kind, why = type(base(model)).__name__, first_line(error)
            raise UserError(f"packing: {kind} refuses packed rows ({why}); {REMEDY}") from error
        found = torch.autograd.grad(logits[:, -SECOND:].float().square().sum(), leaves, allow_unused=True)
    first = [g[:, :FIRST] for g in found if g is not None]
    return any(bool((g.isfinite() & (g != 0)).any()) for g in first)  # ruined weights are told elsewhere


@contextmanager
def _asked(model: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """The model without dropout, its embeddings leaves of the graph: so nothing else gets a gradient."""

    def cut(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    was = {module: module.training for module in model.modules()}
    handle = _embedding(model).register_forward_hook(cut)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            model.eval()
            yield
    finally:
        handle.remove()
        for module, training in was.items():
            module.training = training


def _embedding(model: nn.Module) -> Any:
    return base(model).get_input_embeddings()


def _row(model: nn.Module) -> dict[str, Any]:
    """Two short examples as TRL packs them, of tokens as far as the vocabulary goes."""
    weight = _embedding(model).weight
    rows = [[i % len(weight) for i in range(1, count + 1)] for count in (FIRST, SECOND)]
    collator = importlib.import_module("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    made = collator(pad_token_id=0, padding_free=True)([{"input_ids": ids, "labels": ids} for ids in rows])
    del made["labels"]
    return {n: value.to(weight.device) if isinstance(value, Tensor) else value for n, value in made.items()}


def asks_where_examples_begin(model: nn.Module) -> bool:
    """Whether a model without weights makes its mask of where examples begin.

    The gradient above needs numbers; a plan has none. What it can see is whether transformers is asked.

    Args:
        model: on meta or fake tensors.
    """
    from transformers import masking_utils

    positions = torch.arange(FIRST + SECOND)[None]
    search = patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
    with search as asked, torch.no_grad():
        base(model)(input_ids=positions, position_ids=positions, use_cache=False)
    return bool(asked.called)
