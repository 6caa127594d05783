"""4-bit weights under adapters, as bitsandbytes, peft and transformers hold them, for models without weights.

The real layers cannot be constructed on fake tensors. These stand-ins hold what they hold

    n m / 2 codes; a scale per block of 64: 4 bytes each, or quantized again to one byte with 4 bytes per
    256 blocks and an offset; the tables of both codes

rebuild the weight in forward and again in backward, and give the output the input's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, OUTER = 64, 256


class _Dequantized(torch.autograd.Function):
    """x W' + b with W rebuilt from 4 bits, in forward and again in backward; nothing but codes is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None, None


class Linear4bit(nn.Linear):
    """Stands for a linear layer whose (n, m) weight is held in NF4.

    Args:
        shape: (n, m) of the weight: outputs, inputs.
        bias: of the layer it replaces.
        compute_dtype: of the product.
        double: whether the scales are quantized again.
    """

    def __init__(
        self, shape: tuple[int, int], bias: nn.Parameter | None, compute_dtype: torch.dtype, double: bool
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)
        size = shape[0] * shape[1]
        blocks = -(-size // BLOCK)
        self.weight = nn.Parameter(torch.empty((size + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("code", torch.empty(16, dtype=torch.float32))
        if double:
            self.register_buffer("absmax_outer", torch.empty(-(-blocks // OUTER), dtype=torch.float32))
            self.register_buffer("code_outer", torch.empty(256, dtype=torch.float32))
            self.register_buffer("offset", torch.empty((), dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """One dequantized weight lives for the length of the product."""
        shape = (self.out_features, self.in_features)
        x = input.to(self.compute_dtype)
        out: Tensor = _Dequantized.apply(x, self.weight, self.bias, shape)  # type: ignore[no-untyped-call]
        return out.to(input.dtype)


def quantize(model: Any, *, double: bool = True) -> None:
    """Replace every linear layer but the head, GPT-2's transposed ones too, as transformers does."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head or not (type(child) is nn.Linear or isinstance(child, Conv1D)):
                continue
            rows, columns = child.weight.shape
            shape = (columns, rows) if isinstance(child, Conv1D) else (rows, columns)
            setattr(module, name, Linear4bit(shape, child.bias, child.weight.dtype, double))


def train_scales(model: nn.Module) -> None:
    """Scales are all that trains, as `lowmem.sources.quantized` makes it."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            held = module._buffers.pop("absmax")
            module.absmax = nn.Parameter(held)  # type: ignore[arg-type]


def prepare_for_kbit_training(model: nn.Module) -> None:
    """As `peft.prepare_model_for_kbit_training`: nothing trains, and what is not packed becomes fp32."""
    packed = {id(p) for m in model.modules() if isinstance(m, Linear4bit) for p in m.parameters()}
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in packed:
                module._parameters[name] = made.setdefault(
                    id(p), nn.Parameter(p.detach().to(torch.float32), requires_grad=False)
                )


def adapter_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """For peft: the adapter that belongs to the stand-in."""
    from peft.tuners.lora.layer import Linear

    class Adapter(Linear):  # type: ignore[misc, unused-ignore]
        """LoRA beside a 4-bit layer: its output is cloned, and the adapter's cast before they are added."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = self.base_layer(x).clone()
            a: Any = self.lora_A["default"]
            b: Any = self.lora_B["default"]
            if not torch.is_autocast_enabled("cpu"):
                x = x.to(a.weight.dtype)
            more = b(a(self.lora_dropout["default"](x))) * self.scaling["default"]
            return found.add(more if torch.is_autocast_enabled("cpu") else more.to(found.dtype))

    return {Linear4bit: Adapter}


def constants(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Scales and code tables that bitsandbytes keeps beside a packed weight, outside parameters and buffers.

    Args:
        model: with weights of bitsandbytes or without.
    """
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        while state is not None:
            for name in ("absmax", "code", "offset"):
                held = getattr(state, name, None)
                if isinstance(held, Tensor):
                    yield p, held
            state = getattr(state, "state2", None)
