"""Scales of quantized weights as what is trained (QZO, arXiv 2505.13430).

    w = s c,    s <- s exp(-lr c' z)        the codes c are never touched

A scale is positive and its size depends on the quantizer: it is displaced and
stepped in proportion to itself, so that one radius and one rate serve all (the
paper's radius of 1e-3 is a seventh of the scales of an int4 model).

The scales of bitsandbytes' 4-bit layers are fp32 already: they are their own
master copies, and become parameters where they lie, in the layer's quantization
state, so that a probe, a step and a checkpoint of the model all see the same
tensor. Two traps are closed when they are taken:

* Scales that are themselves quantized ("double quantization") would be one number
  for 16 384 weights; they are decoded, which takes 4 - 1 bytes for each 64 weights.
* On a CPU with AVX512-BF16 a layer in eval mode repacks its codes in its first
  forward pass and replaces the scales by bf16 copies that nobody holds.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.source import Named, Source

SCALE = "absmax"
NAMED = {
    "hqq": ("HQQLinear", "hqq"),
    "gptqmodel": ("TritonV2QuantLinear", "gptqmodel"),
    "auto_gptq": ("QuantLinear", "auto-gptq"),
}
"""Quantizers whose scales could be trained where their package is installed: class and package."""


def scales(model: nn.Module) -> Named:
    """The scales of every 4-bit layer by name, made trainable where they lie.

    Args:
        model: with bitsandbytes 4-bit weights; calling it again gives the same parameters.

    Raises:
        UserError: no quantized layer, or layers of a quantizer that is not supported.

    Bytes: 4 m n / 64 for an (m, n) weight, of which 3 m n / 64 are new where scales were quantized.
    """
    found = [
        (f"{name}.weight.{SCALE}" if name else f"weight.{SCALE}", taken(module))
        for name, module in model.named_modules()
        if is_four_bit(module)
    ]
    if not found:
        raise UserError(_none(model))
    return found


def misfit(name: str, source: Source, quantize: str | None, adapts: bool) -> str:
    """Why a source and the weights of a run do not go together, and what to do; "" where they do.

    Args:
        name: of the strategy; source: its own.
        quantize: how weights are quantized, if they are; adapts: whether adapters are trained.
    """
    if not source.quantized:
        frozen = quantize and not adapts
        return "quantize: frozen weights only; give lora_rank as well, or train with qzo" if frozen else ""
    if adapts:
        return f"lora_rank, adapter: {name} trains the scales of 4-bit weights, no adapters; leave them out"
    return "" if quantize else f"quantize: {name} trains the scales of 4-bit weights; give quantize: nf4"


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module holds bitsandbytes' 4-bit codes."""
    weight = module._parameters.get("weight")
    return getattr(weight, "quant_state", None) is not None


def taken(module: nn.Module) -> nn.Parameter:
    """The scales of one 4-bit layer as a parameter, in its quantization state."""
    weight: Any = module.weight
    state: Any = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            "the model has run in eval mode on this CPU, which repacked its codes: load it anew and make the "
            "optimizer before the first forward pass"
        )
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if not isinstance(state.absmax, nn.Parameter):
        state.absmax = nn.Parameter(_plain(state))
        state.nested, state.state2, state.offset = False, None, None
    state.absmax.requires_grad_(True)
    return state.absmax


def _plain(state: Any) -> Tensor:
    """The scales in fp32, decoded where they are quantized themselves."""
    with torch.no_grad():
        if not state.nested:
            return state.absmax.detach().float()  # type: ignore[no-any-return]
        functional = importlib.import_module("bitsandbytes.functional")
        decoded = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return decoded.detach().float()  # type: ignore[no-any-return]


def owned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a module owns: its own, and the scales of its 4-bit weight."""
    found = {name: p for name, p in module._parameters.items() if p is not None}
    scale = getattr(getattr(found.get("weight"), "quant_state", None), SCALE, None)
    return found | {f"weight.{SCALE}": scale} if isinstance(scale, nn.Parameter) else found


def _none(model: nn.Module) -> str:
    """Why there is nothing to train, and what to do."""
    classes = {type(module).__name__ for module in model.modules()}
    for package, (kind, name) in NAMED.items():
        if kind in classes:
            state = "is" if importlib.util.find_spec(package) else "is not"
            return (
                f"quantized by {name} ({state} installed), whose scales qzo cannot train: use --quantize nf4"
            )
    return "qzo trains the scales of 4-bit weights and this model has none: load it with --quantize nf4"
