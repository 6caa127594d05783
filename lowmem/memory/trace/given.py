"""A model object, planned as it is: frozen parts, adapters, tied weights and cut layers included.

Its modules are copied, its tensors are not: each is replaced by one of the same shape without memory, tied
ones by the same one. The copy is what a trace trains, so nothing is built from the configuration again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.memory.trace.quantized import Linear4bit
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.tensors.marks import trains


class Given:
    """Stands where a configuration does: its attributes, and the model's modules without their tensors.

    Args:
        model: a causal language model of transformers, adapted by peft or not.

    Raises:
        UserError: nothing to train in it, or tensors that a plan cannot stand for.
    """

    def __init__(self, model: nn.Module) -> None:
        _check(model)
        self.config: Any = copy.copy(model.config)
        self.skeleton = emptied(
            model, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "skeleton"):
            raise AttributeError(name)
        return getattr(self.config, name)

    def to_dict(self) -> dict[str, Any]:
        """What tells it from other models: itself."""
        return {"object": id(self.skeleton)}

    def fake(self) -> Any:
        """The model on fake tensors of the mode that is active."""
        return emptied(
            self.skeleton, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")
        )

    def options(self) -> dict[str, Any]:
        """What the object itself says of a run."""
        sizes: dict[torch.dtype, int] = {}
        for p in self.skeleton.parameters():
            if p.is_floating_point():
                sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        recomputes = any(getattr(m, "gradient_checkpointing", False) for m in self.skeleton.modules())
        return {
            "dtype": str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch."),
            "attention": "eager" if self.config._attn_implementation == "eager" else "sdpa",
            "gradient_checkpointing": recomputes,
        }


def _check(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    if not any(trains(p) for p in parameters):
        raise UserError(
            "cannot plan this model: none of its parameters requires a gradient, nothing is trained"
        )
    if any(isinstance(p, DTensor) for p in parameters):
        raise UserError("cannot plan this model: it is sharded; plan it before it is")
    strange = next((p for p in parameters if not (p.is_floating_point() or hasattr(p, "quant_state"))), None)
    if strange is not None:
        raise UserError(f"cannot plan this model: it holds {strange.dtype} weights, and only NF4 is planned")


def emptied(model: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The modules copied, with tensors by `make`; packed weights of bitsandbytes by their stand-ins."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            new = _emptied(tensor, make)
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=trains(tensor)) if trained else new
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            bias = None if module.bias is None else memo[id(module.bias)]
            shape = (module.out_features, module.in_features)
            with torch.device("meta"):
                stand_in = Linear4bit(shape, bias, module.compute_dtype or torch.float32, bool(state.nested))
            memo[id(module)] = stand_in
    return copy.deepcopy(model, memo)


def _emptied(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(tensor, Int8Weight):
        return Int8Weight(make(tensor.codes), make(tensor.scale), tensor.dtype)
    return make(tensor)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
