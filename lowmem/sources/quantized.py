"""Scales of quantized weights as what is trained (QZO, arXiv 2505.13430).

    w = s c,    s <- s exp(-lr c' z)        the codes c are never touched

A scale is positive and its size depends on the quantizer: it is displaced and
stepped in proportion to itself, so that one radius and one rate serve all (the
paper's radius of 1e-3 is a seventh of the scales of an int4 model).

Scales become parameters where they lie, so that a probe, a step and a checkpoint all see
the same tensor: bitsandbytes' in the layer's quantization state, HQQ's in its `meta`,
GPTQ's in the place of the buffer `scales`. Those of bitsandbytes are fp32, their own
master copies; the others, of 16 bits, are rounded at random like any weight. Two traps
are closed when they are taken:

* Scales that are themselves quantized ("double quantization") would be one number
  for 16 384 weights; they are decoded, which takes 4 - 1 bytes for each 64 weights.
* On a CPU with AVX512-BF16 a layer in eval mode repacks its codes in its first
  forward pass and replaces the scales by bf16 copies that nobody holds.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.source import Named, Source

SCALE = "absmax"


def scales(model: nn.Module) -> Named:
    """The scales of every 4-bit layer by name, made trainable where they lie.

    Args:
        model: with 4-bit layers of bitsandbytes, HQQ or GPTQ; calling it again gives the same parameters.

    Raises:
        UserError: no quantized layer, or one that has no scales to train.

    Bytes: 4 m n / 64 for an (m, n) weight, of which 3 m n / 64 are new where scales were quantized.
    """
    found = [
        (f"{name}.{own}" if name else own, scale)
        for name, module in model.named_modules()
        for own, scale in _taken(module).items()
    ]
    if not found:
        raise UserError(
            "qzo trains the scales of 4-bit weights and this model has none: load it with --quantize nf4"
        )
    return found


def unsaved(model: nn.Module) -> str:
    """Why transformers cannot save a model's quantized layers, and what to do; "" where it can."""
    if not any(_is_hqq(module) for module in model.modules()):
        return ""
    return (
        "transformers saves no HQQ layers: load the model with --quantize nf4, or train it in a loop of "
        "your own and save it by hqq's AutoHQQHFModel.save_quantized"
    )


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


def _is_hqq(module: nn.Module) -> bool:
    """Whether a module holds HQQ's codes."""
    return hasattr(module, "W_q") and isinstance(getattr(module, "meta", None), dict)


def _is_gptq(module: nn.Module) -> bool:
    """Whether a module holds GPTQ's codes, under whichever package's class."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("qweight", "scales"))


def _taken(module: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of a quantized layer as a parameter, by its name in a checkpoint; nothing of others."""
    if is_four_bit(module):
        return {f"weight.{SCALE}": _of_bitsandbytes(module)}
    if _is_hqq(module):
        return {"scale": _of_hqq(module)}
    if _is_gptq(module):
        if "scales" in module._buffers:
            held = module._buffers.pop("scales")
            assert held is not None
            module.register_parameter("scales", nn.Parameter(held))
        scale = module.get_parameter("scales")
        scale.requires_grad_(True)
        return {"scales": scale}
    return {}


def _of_hqq(module: Any) -> nn.Parameter:
    meta = module.meta
    if meta.get("quant_scale") or "zero_scale" in meta:
        raise UserError("HQQ scales that are quantized themselves cannot be trained: use quant_scale=False")
    if not isinstance(meta["scale"], nn.Parameter):
        meta["scale"] = nn.Parameter(meta["scale"].detach())
    scale: nn.Parameter = meta["scale"]
    scale.requires_grad_(True)
    return scale


def _of_bitsandbytes(module: nn.Module) -> nn.Parameter:
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
    scale: nn.Parameter = state.absmax
    scale.requires_grad_(True)
    return scale


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
    beside = {f"weight.{SCALE}": getattr(getattr(found.get("weight"), "quant_state", None), SCALE, None)}
    if _is_hqq(module):
        beside["scale"] = module.meta.get("scale")  # type: ignore[operator, union-attr]
    return found | {name: p for name, p in beside.items() if isinstance(p, nn.Parameter)}
